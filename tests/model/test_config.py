import json

import pytest

from codellama.model.config import INFILLING_MODELS, MODELS, ModelConfig
from codellama.model.transformer import Transformer

# Fact sheet 1.3: vocabulary, rotary base, positions.
RELEASED = {
    "7b": (32016, 1e6, 16384),
    "13b": (32016, 1e6, 16384),
    "34b": (32000, 1e6, 16384),
    "70b": (32016, 1e6, 16384),
    "7b-python": (32000, 1e6, 16384),
    "13b-python": (32000, 1e6, 16384),
    "34b-python": (32000, 1e6, 16384),
    "70b-python": (32016, 1e4, 4096),
    "7b-instruct": (32016, 1e6, 16384),
    "13b-instruct": (32016, 1e6, 16384),
    "34b-instruct": (32000, 1e6, 16384),
    "70b-instruct": (32016, 1e4, 4096),
}
SHAPES = {
    "7b": (4096, 32, 32, 32, 11008),
    "13b": (5120, 40, 40, 40, 13824),
    "34b": (8192, 48, 64, 8, 22016),
    "70b": (8192, 80, 64, 8, 28672),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_models(name):
    config = ModelConfig.named(name)
    assert (
        config.vocab_size,
        config.rope_theta,
        config.max_position_embeddings,
    ) == RELEASED[name]
    assert (
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.intermediate_size,
    ) == SHAPES[name.partition("-")[0]]
    assert config.head_dim == 128
    assert config.rms_norm_eps == 1e-5


def test_there_are_twelve_released_models_and_our_own():
    assert set(MODELS) == {*RELEASED, "tiny", "small"}
    assert set(INFILLING_MODELS) == {"7b", "13b", "7b-instruct", "13b-instruct", "70b"}


@pytest.mark.parametrize(
    ("name", "n_params"),
    [
        ("7b", 6_738_546_688),
        ("13b", 13_016_028_160),
        ("70b", 68_976_910_336),
        ("7b-python", 6_738_415_616),
        ("13b-python", 13_015_864_320),
        ("34b", 33_743_970_304),
    ],
)
def test_parameter_counts_of_the_fact_sheet(name, n_params):
    assert ModelConfig.named(name).n_params == n_params


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_parameter_count_is_that_of_the_module(name):
    config = ModelConfig.named(name)
    assert config.n_params == sum(p.numel() for p in Transformer(config).parameters())


def test_the_largest_model_of_ours_fits_into_the_package():
    assert ModelConfig.named("small").n_params * 2 <= 64_000_000


@pytest.mark.parametrize(
    ("size", "kib", "gib_at_16k"),
    [("7b", 512, 8), ("13b", 800, 12.5), ("34b", 192, 3), ("70b", 320, 5)],
)
def test_cache_bytes(size, kib, gib_at_16k):
    config = ModelConfig.named(size)
    assert config.kv_bytes_per_token() == kib * 1024
    assert config.kv_bytes_per_token() * 16384 == gib_at_16k * 2**30
    assert config.kv_bytes_per_token(0.5) == kib * 256


def test_flops_are_those_of_the_matrix_products():
    config = ModelConfig(32, 3, 4, 2, 56, 67)
    # q, k, v, o; gate, up, down; the output projection.
    matrices = 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 56) + 67 * 32
    scores_and_values = 3 * 2 * (2 * 32)  # per layer two products of H * Dh per attended position
    assert config.forward_flops_per_token(10) == 2 * matrices + scores_and_values * 10
    assert config.train_flops_per_token(64) == 3 * config.forward_flops_per_token(32)


def test_flops_of_7b_are_six_per_parameter_and_attention():
    config = ModelConfig.named("7b")
    n_matrix_params = config.n_params - 32016 * 4096 - 65 * 4096  # embedding, norms
    assert config.train_flops_per_token(4096) == 6 * n_matrix_params + 6 * 32 * 4096 * 4096


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("codellama/CodeLlama-7b-hf", "7b"),
        ("codellama/CodeLlama-13b-Python-hf", "13b-python"),
        ("CodeLlama-70b-Instruct-hf", "70b-instruct"),
    ],
)
def test_full_names(name, same):
    assert ModelConfig.named(name) == ModelConfig.named(same)


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"8b.*70b-python"):
        ModelConfig.named("8b")


@pytest.mark.parametrize("name", MODELS)
def test_config_json_round_trip(name):
    config = ModelConfig.named(name)
    values = json.loads(json.dumps(config.to_hf()))
    assert ModelConfig.from_hf(values) == config
    assert values["rope_theta"] == values["rope_parameters"]["rope_theta"] == config.rope_theta
    del values["rope_parameters"]  # as Transformers 4 wrote it
    assert ModelConfig.from_hf(values) == config


def test_config_json_means_the_same_to_transformers():
    from transformers import LlamaConfig

    config = ModelConfig.named("70b-python")
    theirs = LlamaConfig.from_dict(config.to_hf())
    assert theirs.rope_parameters["rope_theta"] == 1e4
    assert ModelConfig.from_hf(theirs.to_dict()) == config


def test_defaults_of_an_old_config_json():
    values = ModelConfig.named("tiny").to_hf()
    for key in ("rope_theta", "rope_parameters", "num_key_value_heads", "rms_norm_eps"):
        del values[key]
    config = ModelConfig.from_hf(values)
    assert (config.rope_theta, config.num_key_value_heads, config.rms_norm_eps) == (1e4, 4, 1e-6)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "qwen2"}, "model_type"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_type"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"rope_parameters": {"rope_theta": None}}, "rope_theta"),
        ({"rope_theta": "many", "rope_parameters": None}, "rope_theta"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"head_dim": 80}, "head_dim"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"hidden_size": 256.5}, "hidden_size"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_theta": float("inf"), "rope_parameters": None}, "rope_theta"),
        ({"num_attention_heads": True}, "num_attention_heads"),
    ],
)
def test_config_json_with_something_else_is_refused(change, named):
    with pytest.raises(ValueError, match=named):
        ModelConfig.from_hf(ModelConfig.named("tiny").to_hf() | change)


def test_missing_key_is_named():
    values = ModelConfig.named("tiny").to_hf()
    del values["intermediate_size"]
    with pytest.raises(ValueError, match="intermediate_size"):
        ModelConfig.from_hf(values)


def test_dimensions_must_divide():
    with pytest.raises(ValueError, match="hidden_size = 30"):
        ModelConfig(30, 2, 4, 4, 56, 67)
    with pytest.raises(ValueError, match="num_key_value_heads = 3"):
        ModelConfig(32, 2, 4, 3, 56, 67)


def test_replace_names_an_unknown_field():
    config = ModelConfig.named("tiny")
    assert config.replace(vocab_size=604).vocab_size == 604
    with pytest.raises(ValueError, match=r"n_layers.*num_hidden_layers"):
        config.replace(n_layers=2)
