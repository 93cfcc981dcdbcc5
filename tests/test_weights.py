"""All formats hold the same model, and other implementations read the same from them."""

import json
import shutil

import pytest
import torch

from any_weights import SMALL, random_model, same_tensors, small_vocabulary, write_folder
from codellama.model.checkpoint import load_checkpoint, save_checkpoint
from codellama.model.config import ModelConfig
from codellama.tokenizer import Tokenizer
from codellama.weights import convert, load, named_variant, open_weights

TOKENS = torch.tensor([[1, 300, 299, 17, 3, 380, 250, 31, 8], [1, 5, 9, 260, 261, 262, 399, 2, 0]])
WAYS = {
    "hf": ("hf", {}),
    "hf in parts": ("hf", {"max_shard_bytes": 50_000}),
    "meta 1": ("meta", {}),
    "meta 2": ("meta", {"n_shards": 2}),
    "meta 8": ("meta", {"n_shards": 8}),
    "gguf": ("gguf", {}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("weights") / "model")


def content(folder):
    return {path.name: path.read_bytes() for path in folder.glob("model*")}


@pytest.mark.parametrize("way", WAYS)
def test_every_format_gives_identical_logits_and_the_same_tokenizer(folder, tmp_path, way):
    to, options = WAYS[way]
    expected = random_model()(TOKENS)
    converted = convert(folder, tmp_path / f"converted.{to}", to, **options)
    model, tokenizer = load(converted, dtype="float32")
    assert torch.equal(model(TOKENS), expected)
    assert model.config == SMALL
    assert tokenizer.file.pieces == small_vocabulary().file.pieces
    assert tokenizer.supports_infilling
    assert tokenizer.chat_format is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("way", WAYS)
def test_there_and_back_is_the_identity_bit_for_bit(tmp_path, way, dtype):
    to, options = WAYS[way]
    source = write_folder(tmp_path / "source", dtype=dtype)
    convert(convert(source, tmp_path / f"there.{to}", to, **options), tmp_path / "back")
    assert same_tensors(
        load_checkpoint(tmp_path / "back", dtype=None), load_checkpoint(source, dtype=None)
    )
    assert content(tmp_path / "back") == content(source)  # the files, byte for byte
    assert (tmp_path / "back/tokenizer.json").read_bytes() == (
        source / "tokenizer.json"
    ).read_bytes()
    assert (tmp_path / "back/config.json").read_bytes() == (source / "config.json").read_bytes()


@pytest.mark.parametrize("config", ["mha", "gqa"])
@pytest.mark.parametrize("to", ["hf", "meta", "gguf"])
def test_transformers_agrees(tmp_path, to, config):
    transformers = pytest.importorskip("transformers")
    n_kv_heads = {"mha": 8, "gqa": 2}[config]
    shape = SMALL.replace(num_key_value_heads=n_kv_heads)
    folder = write_folder(tmp_path / "source", shape)
    other = convert(folder, tmp_path / "other", to)
    mine, _ = load(other, dtype="float32")
    back = convert(other, tmp_path / "back")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(TOKENS).logits
    torch.testing.assert_close(mine(TOKENS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-3), ("bfloat16", 0.1)])
def test_llama_cpp_generates_the_same_tokens(tmp_path, dtype, tolerance):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    folder = write_folder(tmp_path / "source", SMALL.replace(num_key_value_heads=4))
    path = convert(folder, tmp_path / "model.gguf", "gguf", dtype=dtype)
    model, tokenizer = load(path, dtype="float32")
    exact = {"type_k": 0, "type_v": 0}  # a float32 cache; float16 is the default
    llama = llama_cpp.Llama(
        str(path), n_ctx=128, n_threads=1, verbose=False, logits_all=True, **exact
    )
    ids = TOKENS[0].tolist()
    llama.eval(ids)
    logits = torch.from_numpy(llama.scores[: len(ids)].copy())
    torch.testing.assert_close(model(TOKENS[:1])[0], logits, rtol=0, atol=tolerance)
    for text in ("there, their", "  two  spaces\n", "日本", ""):
        assert llama.tokenize(text.encode(), add_bos=True) == tokenizer.encode(text, bos=True)
    if dtype == "float32":  # bfloat16 rounds inside llama.cpp's products, where random logits tie
        llama.reset()
        theirs = []
        for token in llama.generate(ids, top_k=1, temp=0.0, repeat_penalty=1.0):
            theirs.append(token)
            if len(theirs) == 30:
                break
        with torch.inference_mode():
            mine = model(torch.tensor([ids + theirs]))[0, len(ids) - 1 : -1].argmax(-1)
        assert mine.tolist() == theirs


def test_older_weights_of_transformers(folder, tmp_path):
    expected = random_model()(TOKENS)
    old = shutil.copytree(folder, tmp_path / "old")
    (old / "model.safetensors").unlink()
    tensors = dict(random_model().state_dict())
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    torch.save(tensors, old / "pytorch_model.bin")
    assert torch.equal(load(old, dtype="float32")[0](TOKENS), expected)
    tensors["model.layers.0.self_attn.rotary_emb.other"] = torch.ones(4)
    torch.save(tensors, old / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"rotary_emb\.other"):
        load(old)


@pytest.mark.parametrize("quantize", ["q8_0", "q4_0"])
def test_quantised_files_stay_close(folder, tmp_path, quantize):
    path = convert(folder, tmp_path / "q.gguf", "gguf", quantize=quantize)
    expected, got = random_model()(TOKENS), load(path, dtype="float32")[0](TOKENS)
    error = (got - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < {"q8_0": 0.03, "q4_0": 0.4}[quantize]
    assert path.stat().st_size < 0.35 * (folder / "model.safetensors").stat().st_size


@pytest.mark.parametrize("way", ["hf", "meta 2", "gguf"])
def test_int8_is_close_to_bfloat16_in_every_format(folder, tmp_path, way):
    to, options = WAYS[way]
    path = convert(folder, tmp_path / f"x.{to}", to, **options)
    exact, rounded = load(path)[0](TOKENS), load(path, dtype="int8")[0](TOKENS)
    log_p, log_q = exact.log_softmax(-1), rounded.log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert divergence < 0.01
    assert exact.argmax(-1).eq(rounded.argmax(-1)).float().mean() > 0.8


def test_a_70b_shape_checks_out_without_memory():
    from codellama.model.checkpoint import plan_shards
    from codellama.model.meta import parse_params, shard_shapes, write_params
    from codellama.model.source import tensor_shapes

    config = ModelConfig.named("70b")
    shapes = tensor_shapes(config)
    count = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert count == config.n_params == 68_976_910_336  # fact sheet 1.2
    assert len(shapes) == 80 * 9 + 3
    for n_shards in (1, 2, 4, 8):
        parts = shard_shapes(config, n_shards)
        assert parts["layers.79.attention.wk.weight"] == (1024 // n_shards, 8192)
        whole = sum(torch.Size(s).numel() for s in parts.values()) * n_shards
        assert whole == count + (n_shards - 1) * 161 * 8192  # every shard holds all norms
    plan = plan_shards({n: 2 * torch.Size(s).numel() for n, s in shapes.items()}, 5_000_000_000)
    assert len(plan) == 29
    assert [name for names in plan.values() for name in names] == list(shapes)
    assert write_params(config)["multiple_of"] == 4096
    assert parse_params(write_params(config), 32016).intermediate_size == 28672


# -- what is refused, and what is left behind ---------------------------------------------------


def test_what_is_no_model(tmp_path):
    for path, message in (
        (tmp_path / "nothing", "no such file or folder"),
        (tmp_path, "no model: expected config.json"),
        (tmp_path / "file.bin", "expected a folder or a .gguf file"),
    ):
        if path.suffix:
            path.write_bytes(b"x")
        with pytest.raises(ValueError, match=message):
            load(path)


def test_a_tokenizer_of_another_model(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "tokenizer.model").write_bytes(small_vocabulary(392).file.to_bytes())
    with pytest.raises(ValueError, match=r"392 pieces.*400 rows"):
        load(other)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("vocab_size", 2**62, "vocab_size"),  # found by fuzzing: sizes overflowed
        ("num_hidden_layers", 10**7, "asks for 10000000 layers"),
        ("intermediate_size", 10**30, "intermediate_size"),
        ("hidden_size", 1.5, "whole number"),
        ("rope_parameters", {"rope_theta": float("inf")}, "rope_theta"),
    ],
)
def test_absurd_configurations(folder, tmp_path, key, value, message):
    bad = shutil.copytree(folder, tmp_path / "bad")
    values = json.loads((bad / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps(values | {key: value}))
    with pytest.raises(ValueError, match=message) as error:
        load(bad)
    assert str(bad) in str(error.value)


@pytest.mark.parametrize("way", ["hf", "meta 2", "gguf"])
def test_a_vocabulary_that_sentencepiece_refuses_is_named(tmp_path, way):
    to, options = WAYS[way]
    path = convert(write_folder(tmp_path / "source"), tmp_path / "bad", to, **options)
    file = path if to == "gguf" else path / "tokenizer.model"
    data = file.read_bytes()
    marks = b"\x02" + bytes(7) if to == "gguf" else b"\n\x02"  # the length before the piece
    assert marks + b"tt" in data
    file.write_bytes(data.replace(marks + b"tt", marks + b"t\0"))  # found by fuzzing
    with pytest.raises(ValueError, match="null character") as error:
        load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("way", ["hf", "meta 2", "gguf"])
def test_weights_that_are_no_numbers(tmp_path, way, value):
    to, options = WAYS[way]
    model = random_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[5, 7] = value
    source = tmp_path / "source"
    save_checkpoint(
        source, SMALL, model.state_dict(), "float32", write_more=small_vocabulary().save
    )
    with pytest.raises(
        ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*NaN or infinite"
    ):
        convert(source, tmp_path / "refused", to, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    bad = convert(source, tmp_path / "bad.gguf", to, allow_nonfinite=True, **options)
    with pytest.raises(
        ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*NaN or infinite"
    ):
        load(bad)
    assert load(bad, dtype="float32", allow_nonfinite=True)


def test_values_that_float16_cannot_hold(folder, tmp_path):
    model = random_model()
    with torch.no_grad():
        model.lm_head.weight[3, 4] = 1e6
    save_checkpoint(tmp_path / "m", SMALL, model.state_dict(), write_more=small_vocabulary().save)
    with pytest.raises(ValueError, match=r"lm_head\.weight.*too large for float16"):
        load(tmp_path / "m", dtype="float16")


def test_options_that_make_no_sense(folder, tmp_path):
    for options, message in (
        ({"to": "onnx"}, "expected one of hf, meta, gguf"),
        ({"dtype": "int3"}, "expected one of bfloat16"),
        ({"to": "hf", "quantize": "q8_0"}, "quantize is for 'gguf' only"),
        ({"to": "gguf", "quantize": "q2"}, "expected one of q8_0, q4_0"),
        ({"to": "gguf", "quantize": "q8_0", "dtype": "float16"}, "not both"),
        ({"to": "meta", "n_shards": 3}, "possible: 1, 2, 4, 8"),
        ({"to": "gguf", "n_shards": 2}, "n_shards is for 'meta' only"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(folder, tmp_path / "out", **options)
    with pytest.raises(ValueError, match="exists already"):
        convert(folder, folder)
    with pytest.raises(ValueError, match="exists already"):
        convert(folder, tmp_path)
    with pytest.raises(ValueError, match=r"int3.*bfloat16.*int8"):
        load(folder, dtype="int3")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("way", ["hf", "meta 8", "gguf"])
def test_an_interrupted_conversion_leaves_nothing(folder, tmp_path, way):
    to, options = WAYS[way]

    def interrupt(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(folder, tmp_path / "out", to, progress=interrupt, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("way", ["hf", "meta 2", "gguf"])
def test_a_full_disk_is_one_clear_line(folder, tmp_path, way):
    resource = pytest.importorskip("resource")
    import signal

    to, options = WAYS[way]
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, usual[1]))
        with pytest.raises(
            OSError, match=r"writing failed.*GB are needed and nothing was left"
        ) as e:
            convert(folder, tmp_path / "out", to, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(e.value)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_too_small_is_noticed_first(folder, tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="the disk has only"):
        convert(folder, tmp_path / "out", "gguf")
    assert not list(tmp_path.iterdir())


def test_the_folder_tells_the_variant(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("codellama.weights").weights.MODELS, "7b-instruct", SMALL)
    monkeypatch.setitem(__import__("codellama.weights").weights.MODELS, "7b", SMALL)
    for name, variant in (
        ("CodeLlama-7b-Instruct", "7b-instruct"),
        ("CodeLlama-7b-hf", "7b"),
        ("CodeLlama-34b", None),  # another shape
        ("mine", None),
    ):
        assert named_variant(open_weights(write_folder(tmp_path / name))) == variant
    cached = tmp_path / "models--codellama--CodeLlama-7b-hf/snapshots/0123"
    assert named_variant(open_weights(write_folder(cached))) == "7b"


def test_tokenizer_of_the_original_is_kept(tmp_path):
    source = write_folder(tmp_path / "source")
    file = small_vocabulary().file
    data = file.to_bytes() + b""
    (source / "tokenizer.model").write_bytes(data)
    meta = convert(source, tmp_path / "meta", "meta")
    assert (meta / "tokenizer.model").read_bytes() == data
    assert Tokenizer.load(meta / "tokenizer.model").vocab_size == 400
