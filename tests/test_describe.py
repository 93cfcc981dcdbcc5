"""What `codellama inspect` says about weights of every format."""

import pytest

from any_weights import SMALL, small_vocabulary, write_folder
from codellama.describe import describe, recognise, weight_bytes
from codellama.model.config import MODELS
from codellama.tokenizer.variants import VARIANTS
from codellama.weights import convert, load


@pytest.mark.parametrize("to", ["hf", "meta", "gguf"])
def test_every_format(tmp_path, to):
    source = write_folder(tmp_path / "source", dtype="bfloat16")
    path = convert(source, tmp_path / "converted", to)
    found = describe(path)
    assert found.kind == to
    assert found.config == SMALL
    assert found.n_params == SMALL.n_params
    assert (found.context, found.rope_theta, found.vocab_size) == (512, 1e6, 400)
    assert found.infilling
    assert found.chat_format is None
    assert found.variants == ()
    norms = 5 * 64 if to == "gguf" else 0
    assert found.precisions[{"gguf": "BF16"}.get(to, "bfloat16")] == SMALL.n_params - norms
    assert found.file_bytes == 2 * SMALL.n_params + 2 * norms
    cache = 512 * 2 * 2 * 64 * 2  # positions, keys and values, layers, width, bytes
    assert found.memory_bytes["bfloat16"] == {512: 2 * SMALL.n_params + cache}


@pytest.mark.parametrize("to", ["hf", "meta", "gguf"])
def test_chat_models(tmp_path, to):
    source = write_folder(tmp_path / "source")
    small_vocabulary().with_chat_format("inst").save(source)
    assert describe(convert(source, tmp_path / "converted", to)).chat_format == "inst"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8"])
def test_memory_of_weights_is_what_loading_takes(tmp_path, dtype):
    model, _ = load(write_folder(tmp_path / "source"), dtype=dtype)
    assert sum(t.nbytes for t in model.state_dict().values()) == weight_bytes(SMALL, dtype)


@pytest.mark.parametrize("name", VARIANTS)
def test_released_models_are_recognised(name):
    found = recognise(MODELS[name], VARIANTS[name].chat_format)
    # Nothing but the name tells these two apart.
    assert found == (("34b", "34b-python") if name in ("34b", "34b-python") else (name,))
    assert recognise(MODELS[name], VARIANTS[name].chat_format, name) == (name,)


def test_llama_2_is_not_taken_for_code_llama():
    assert recognise(MODELS["7b-python"].replace(rope_theta=1e4), None) == ()


def test_memory_of_the_7b_model():
    config = MODELS["7b"]
    assert weight_bytes(config, "bfloat16") == 2 * 6_738_546_688  # fact sheet 1.2
    assert weight_bytes(config, "int8") < 0.52 * weight_bytes(config, "bfloat16")
