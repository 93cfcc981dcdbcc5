import errno
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TINY, tiny_model

from codellama.model import checkpoint
from codellama.model.checkpoint import (
    load_checkpoint,
    load_config,
    open_checkpoint,
    save_checkpoint,
)
from codellama.model.config import ModelConfig

CONFIG = TINY["grouped-query"]
TOKENS = torch.randint(0, 67, (2, 20), generator=torch.Generator().manual_seed(1))
NAME = "model.layers.1.mlp.up_proj.weight"


def save(folder, dtype="float32", max_shard_bytes=5_000_000_000, **options):
    model = tiny_model(CONFIG)
    save_checkpoint(folder, CONFIG, model.state_dict(), dtype, max_shard_bytes, **options)
    return model


def change_tensors(folder, change):
    """Rewrite the one weight file of a checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def folder(tmp_path):
    save(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path):
    save(tmp_path / "model", max_shard_bytes=20_000)
    return tmp_path / "model"


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 20_000, 1])
def test_round_trip(tmp_path, max_shard_bytes):
    model = save(tmp_path / "model", max_shard_bytes=max_shard_bytes)
    loaded = load_checkpoint(tmp_path / "model", dtype="float32")
    assert loaded.config == CONFIG
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS), model(TOKENS))


def test_shards_keep_below_the_limit_and_are_indexed(sharded):
    files = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == 4 * CONFIG.n_params
    for file in files:
        held = load_file(sharded / file)
        assert {n for n, f in index["weight_map"].items() if f == file} == set(held)
        assert sum(t.nbytes for t in held.values()) <= 20_000


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_types_are_converted_on_the_way_in_and_out(tmp_path, dtype):
    model = save(tmp_path / "model", dtype)
    kind = getattr(torch, dtype)
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert torch.equal(stored[NAME], model.state_dict()[NAME].to(kind))
    assert json.loads((tmp_path / "model" / "config.json").read_text())["torch_dtype"] == dtype
    assert load_checkpoint(tmp_path / "model", dtype=None).lm_head.weight.dtype == kind
    assert load_checkpoint(tmp_path / "model").lm_head.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"int3.*bfloat16"):
        load_checkpoint(tmp_path / "model", dtype="int3")


@pytest.mark.parametrize("shape", TINY)
@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 20_000])
def test_transformers_opens_the_folder(tmp_path, shape, max_shard_bytes):
    from transformers import AutoModelForCausalLM

    model = tiny_model(TINY[shape])
    save_checkpoint(tmp_path, TINY[shape], model.state_dict(), "float32", max_shard_bytes)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())  # missing, unexpected, mismatched keys
    assert theirs.config.rope_parameters["rope_theta"] == TINY[shape].rope_theta
    assert (theirs.generation_config.bos_token_id, theirs.generation_config.eos_token_id) == (1, 2)
    with torch.no_grad():
        ours, others = load_checkpoint(tmp_path, dtype="float32")(TOKENS), theirs(TOKENS).logits
    assert (ours - others).abs().max() <= 1e-5 * others.std()


def test_transformers_reads_the_tokenizer_of_the_folder(tmp_path, small_tokenizer, stdlib_sources):
    from transformers import AutoTokenizer

    config = CONFIG.replace(vocab_size=small_tokenizer.vocab_size)
    model = tiny_model(config)
    save_checkpoint(tmp_path, config, model.state_dict(), write_more=small_tokenizer.save)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*stdlib_sources[:3], "  x = [1]\n\n\n\ty", "ä → 日本 🎉"]:
        assert theirs(text, add_special_tokens=False)["input_ids"] == small_tokenizer.encode(text)
    assert theirs("x")["input_ids"] == small_tokenizer.encode("x", bos=True)


def missing(tensors):
    del tensors[NAME]


def extra(tensors):
    tensors["model.layers.9.bonus.weight"] = torch.zeros(3)


def misshaped(tensors):
    tensors[NAME] = tensors[NAME].t().contiguous()


def renamed(tensors):
    tensors["up_proj.weight"] = tensors.pop(NAME)


def not_finite(tensors):
    tensors[NAME][3, 4] = float("nan")


def of_another_type(tensors):
    tensors[NAME] = tensors[NAME].to(torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (missing, f"{NAME}'.* missing"),
        (extra, "bonus.*not part of this model"),
        (misshaped, rf"{NAME}' has shape \(32, 56\).*\(56, 32\)"),
        (renamed, f"{NAME}'.* missing"),
        (not_finite, f"{NAME}.*NaN"),
        (of_another_type, f"{NAME}.*I32"),
    ],
)
def test_wrong_tensor_is_named(folder, change, message):
    change_tensors(folder, change)
    with pytest.raises(ValueError, match=message) as error:
        load_checkpoint(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("field", ["intermediate_size", "vocab_size", "num_hidden_layers"])
def test_config_that_does_not_fit_the_tensors(folder, field):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {field: values[field] * 2}))
    with pytest.raises(ValueError, match="tensor"):
        load_checkpoint(folder)


@pytest.mark.parametrize("kept", [0, 4, 8, 100, 2_000, -1])
def test_truncated_weights(folder, kept):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged"):
        load_checkpoint(folder)


def test_header_that_promises_too_much(folder):
    path = folder / "model.safetensors"
    path.write_bytes((1 << 62).to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged"):
        load_checkpoint(folder)


def test_missing_shard_is_named(sharded):
    (sharded / sorted(path.name for path in sharded.glob("*.safetensors"))[1]).unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-\d+\.safetensors: missing"):
        load_checkpoint(sharded)


@pytest.mark.parametrize("name", ["../model-00001.safetensors", "/etc/passwd", "a/b", 7])
def test_index_that_leads_out_of_the_folder(sharded, name):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    # It would work if it were followed.
    (sharded.parent / "model-00001.safetensors").write_bytes(
        (sharded / index["weight_map"][NAME]).read_bytes()
    )
    index["weight_map"][NAME] = name
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json.*plain name"):
        load_checkpoint(sharded)


def test_link_that_leads_out_of_the_folder(folder):
    target = folder.parent / "elsewhere.safetensors"
    (folder / "model.safetensors").rename(target)
    (folder / "model.safetensors").symlink_to(target)
    with pytest.raises(ValueError, match="link that leads out"):
        load_checkpoint(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"weight_map": 3}', "{}"])
def test_damaged_index(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index\.json"):
        load_checkpoint(sharded)


def test_index_that_disagrees_with_a_file(sharded):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["lm_head.weight"] = files[0]
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"lm_head\.weight.*disagrees"):
        load_checkpoint(sharded)


def test_what_is_no_checkpoint_is_named(tmp_path, folder):
    with pytest.raises(ValueError, match=r"nothing: not a checkpoint folder"):
        load_checkpoint(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"config\.json"):
        load_checkpoint(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no weights: expected model\.safetensors"):
        load_checkpoint(folder)
    for content in ("{", "[1]", '{"model_type": "gpt2"}'):
        (folder / "config.json").write_text(content)
        with pytest.raises(ValueError, match=r"config\.json"):
            load_config(folder)


def test_saving_refuses_tensors_that_are_not_the_model(tmp_path):
    tensors = tiny_model(CONFIG).state_dict()
    for change, message in ((missing, "missing"), (extra, "bonus"), (misshaped, "shape")):
        changed = dict(tensors)
        change(changed)
        with pytest.raises(ValueError, match=message):
            save_checkpoint(tmp_path / "model", CONFIG, changed)
    assert list(tmp_path.iterdir()) == []


# -- no space left --------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 512 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_full_disk_leaves_the_old_checkpoint(small_disk):
    model = save(small_disk / "model")  # 100 kB
    before = (small_disk / "model" / "model.safetensors").read_bytes()
    (small_disk / "filler").write_bytes(bytes(340_000))
    for max_shard_bytes in (5_000_000_000, 20_000):
        with pytest.raises(OSError, match=r"model|space"):
            save(small_disk / "model", max_shard_bytes=max_shard_bytes)
        assert sorted(path.name for path in small_disk.iterdir()) == ["filler", "model"]
        assert (small_disk / "model" / "model.safetensors").read_bytes() == before
    (small_disk / "filler").unlink()
    save(small_disk / "model")
    with torch.no_grad():
        assert torch.equal(
            load_checkpoint(small_disk / "model", dtype="float32")(TOKENS), model(TOKENS)
        )


@pytest.mark.parametrize("failing", ["save_file", "_write_json", "write_more"])
def test_failed_write_leaves_the_old_checkpoint(folder, failing, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    options = {}
    if failing == "write_more":
        options["write_more"] = fail
    else:
        monkeypatch.setattr(checkpoint, failing, fail)
    with pytest.raises(OSError, match="No space"):
        save(folder, **options)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


# -- memory ---------------------------------------------------------------------------------

MAPPED = """
import re, sys
from pathlib import Path
from codellama.model.checkpoint import load_checkpoint, open_checkpoint

def kib(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

before = kib("RssAnon"), kib("VmRSS")
weights = open_checkpoint(sys.argv[1])
print(kib("VmRSS") - before[1])
model = load_checkpoint(sys.argv[1], dtype=None)
print(kib("RssAnon") - before[0])
print(Path("/proc/self/maps").read_text().count(sys.argv[1] + "/model.safetensors"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_are_mapped_and_not_copied(tmp_path):
    config = ModelConfig(1024, 4, 8, 8, 2048, 2000)  # 58 MB
    tensors = {
        name: torch.zeros(stored, dtype=torch.bfloat16)
        for name, stored in checkpoint.tensor_shapes(config).items()
    }
    save_checkpoint(tmp_path / "model", config, tensors)
    n_kib = (tmp_path / "model" / "model.safetensors").stat().st_size // 1024
    assert n_kib > 50_000
    program = [sys.executable, "-c", MAPPED, str(tmp_path / "model")]
    run = subprocess.run(program, capture_output=True, text=True, check=True)
    opened, copied, n_maps = map(int, run.stdout.split())
    assert opened < n_kib / 4  # opening reads the directory only
    assert copied < n_kib / 4  # loading copies nothing
    assert n_maps > 0


def test_opening_lists_all_tensors(sharded):
    weights = open_checkpoint(sharded)
    assert {name: stored.shape for name, stored in weights.tensors.items()} == (
        checkpoint.tensor_shapes(CONFIG)
    )
