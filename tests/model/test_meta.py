"""Meta's layout: names, cuts, rotation, params.json, and what is refused."""

import json
import shutil

import pytest
import torch

from any_weights import SMALL, random_model, reference_logits, write_folder
from codellama.model.config import MODELS, ModelConfig
from codellama.model.meta import (
    open_meta,
    parse_params,
    shard_shapes,
    to_halves,
    to_hf_name,
    to_meta_name,
    to_neighbours,
    write_params,
)
from codellama.model.source import build_model, tensor_shapes
from codellama.weights import convert, load

TOKENS = torch.tensor([1, 300, 299, 17, 3, 380, 250, 31, 8])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture
def two(source, tmp_path):
    """A folder of two shards."""
    return convert(source, tmp_path / "two", "meta", n_shards=2)


def change_shard(folder, change, name="consolidated.00.pth"):
    tensors = torch.load(folder / name, weights_only=True)
    change(tensors)
    torch.save(tensors, folder / name)


def change_params(folder, **changes):
    params = json.loads((folder / "params.json").read_text())
    params |= changes
    params = {key: value for key, value in params.items() if value != "remove"}
    (folder / "params.json").write_text(json.dumps(params))


@pytest.mark.parametrize("n_kv_heads", [8, 2])
def test_the_reference_forward_pass_agrees(tmp_path, n_kv_heads):
    config = SMALL.replace(num_key_value_heads=n_kv_heads)
    source = write_folder(tmp_path / "source", config)
    meta = convert(source, tmp_path / "meta", "meta")
    tensors = torch.load(meta / "consolidated.00.pth", weights_only=True)
    expected = reference_logits(tensors, config, TOKENS)
    assert expected.std() > 0.5
    mine = random_model(config)(TOKENS[None])[0]
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)


def test_names_go_there_and_back():
    for name in tensor_shapes(ModelConfig.named("tiny")):
        assert to_hf_name(to_meta_name(name)) == name
    assert (
        to_meta_name("model.layers.12.mlp.gate_proj.weight") == "layers.12.feed_forward.w1.weight"
    )
    assert to_meta_name("model.layers.3.mlp.up_proj.weight") == "layers.3.feed_forward.w3.weight"
    for name in ("rope.freqs", "layers.01.attention.wq.weight", "layers.0.attention.wq.bias", "x"):
        assert to_hf_name(name) is None


def test_rows_are_reordered_as_the_fact_sheet_says():
    rows = torch.arange(16).float()[:, None]  # two heads of width 8, in Meta's order
    expected = [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]
    assert to_halves(rows, 8).flatten().tolist() == expected
    assert torch.equal(to_neighbours(to_halves(rows, 8), 8), rows)


@pytest.mark.parametrize("name", MODELS)
def test_params_of_every_model_give_its_shape_back(name):
    config = MODELS[name]
    parsed = parse_params(write_params(config), config.vocab_size)
    assert parsed.replace(max_position_embeddings=config.max_position_embeddings) == config
    if name not in ("tiny", "small"):  # the context follows from the rotary base
        assert parsed == config


def test_published_params_are_understood():
    base = {"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256, "norm_eps": 1e-5}
    code = base | {"ffn_dim_multiplier": 1.0, "rope_theta": 1000000}
    assert parse_params(code, 32016) == MODELS["7b"]
    assert parse_params(base | {"vocab_size": -1}, 32000).rope_theta == 1e4  # Llama 2
    nulls = base | {"n_kv_heads": None, "ffn_dim_multiplier": None, "use_scaled_rope": False}
    assert parse_params(nulls, 32000) == parse_params(base, 32000)
    large = {"dim": 8192, "n_layers": 80, "n_heads": 64, "n_kv_heads": 8, "norm_eps": 1e-5}
    large |= {"multiple_of": 4096, "ffn_dim_multiplier": 1.3, "rope_theta": 1000000}
    assert parse_params(large | {"vocab_size": 32016}, 32016) == MODELS["70b"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": None}, "dim = None"),
        ({"dim": "4096"}, "dim = '4096'"),
        ({"n_layers": True}, "n_layers = True"),
        ({"n_heads": 0}, "n_heads = 0"),
        ({"norm_eps": -1}, "norm_eps = -1"),
        ({"norm_eps": float("nan")}, "norm_eps = nan"),
        ({"multiple_of": 1e300}, "multiple_of"),
        ({"vocab_size": 5}, "vocab_size = 5, but the embedding has 400 rows"),
        ({"use_scaled_rope": True}, "use_scaled_rope"),
        ({"moe": {}}, "unknown field 'moe'"),
        ({"n_layers": "remove"}, "'n_layers' is missing"),
        ({"n_layers": 3}, "'model.layers.2"),
        ({"n_layers": 1}, "not part of this model"),
        ({"n_layers": 10**7}, "asks for 10000000 layers"),
        ({"dim": 128}, "cut for 4"),
        ({"n_kv_heads": 4}, "k_proj.weight' has shape"),
        ({"n_heads": 3}, "hidden_size = 64"),
        ({"ffn_dim_multiplier": 2.0}, "gate_proj.weight' has shape"),
    ],
)
def test_params_that_contradict_the_tensors(two, changes, message):
    change_params(two, **changes)
    with pytest.raises(ValueError, match="two") as error:
        build_model(open_meta(two))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_shards_missing_and_in_surplus(two):
    shutil.copy(two / "consolidated.01.pth", two / "consolidated.03.pth")
    with pytest.raises(ValueError, match=r"consolidated\.02\.pth: missing"):
        load(two)
    (two / "consolidated.03.pth").rename(two / "consolidated.02.pth")
    with pytest.raises(ValueError, match=r"3 shards, but .* cut for 2"):
        load(two)
    (two / "consolidated.02.pth").unlink()
    (two / "consolidated.01.pth").unlink()
    with pytest.raises(ValueError, match=r"1 shards, but .* cut for 2"):
        load(two)
    (two / "consolidated.00.pth").rename(two / "consolidated.01.pth")
    with pytest.raises(ValueError, match=r"consolidated\.00\.pth: missing"):
        load(two)
    (two / "consolidated.01.pth").unlink()
    with pytest.raises(ValueError, match="0 shards"):
        load(two)


def test_params_missing(two):
    (two / "params.json").unlink()
    with pytest.raises(ValueError, match=r"params\.json: missing"):
        load(two)


def test_only_rope_freqs_is_ignored(two):
    for name in ("consolidated.00.pth", "consolidated.01.pth"):
        change_shard(two, lambda t: t.update({"rope.freqs": torch.ones(4)}), name)
    load(two)
    change_shard(two, lambda t: t.update({"rope.freqs2": torch.ones(4)}))
    with pytest.raises(ValueError, match=r"consolidated\.00\.pth: tensor 'rope\.freqs2' not part"):
        load(two)


def test_shards_that_do_not_belong_together(two):
    change_shard(two, lambda t: t["norm.weight"].add_(1))
    with pytest.raises(ValueError, match=r"'norm\.weight' of shard 1 is not the same"):
        load(two)
    change_shard(two, lambda t: t["norm.weight"].sub_(1))
    change_shard(two, lambda t: t.pop("output.weight"), "consolidated.01.pth")
    with pytest.raises(ValueError, match=r"consolidated\.01\.pth: .*'lm_head\.weight' is in one"):
        load(two)


def test_a_tensor_of_another_type(two):
    def to_integers(tensors):
        tensors["norm.weight"] = tensors["norm.weight"].int()

    change_shard(two, to_integers)
    with pytest.raises(ValueError, match=r"'norm\.weight' has type int32"):
        load(two)


def test_links_that_lead_out(two, source):
    (two / "params.json").rename(two.parent / "params.json")
    (two / "params.json").symlink_to(two.parent / "params.json")
    with pytest.raises(ValueError, match="leads out of its folder"):
        load(two)


def test_shards_that_a_shape_allows():
    with pytest.raises(
        ValueError, match=r"n_shards = 16: num_key_value_heads.*possible: 1, 2, 4, 8"
    ):
        shard_shapes(MODELS["70b"], 16)
    with pytest.raises(ValueError, match=r"possible: 1, 2$"):
        shard_shapes(MODELS["tiny"], 4)
