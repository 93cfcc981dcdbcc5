"""GGUF files: the layout others read, and damage that is noticed before memory is asked for."""

import struct

import numpy as np
import pytest
import torch

from any_weights import SMALL, random_model, reference_logits, write_folder
from codellama.model.gguf import (
    open_gguf,
    read_directory,
    to_gguf_name,
    to_hf_name,
    write_config,
    write_gguf,
)
from codellama.model.gguf_blocks import BY_NAME
from codellama.model.meta import to_meta_name
from codellama.model.source import build_model, tensor_shapes
from codellama.weights import convert, load

gguf = pytest.importorskip("gguf")
WIDE = SMALL.replace(hidden_size=256, intermediate_size=256)  # rows of one K block


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    return convert(write_folder(folder / "source"), folder / "model.gguf", "gguf")


def test_the_gguf_package_reads_all_metadata(path):
    reader = gguf.GGUFReader(path)

    def value(key):
        return reader.fields[key].contents()

    expected = {
        "general.architecture": "llama",
        "llama.context_length": 512,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 96,
        "llama.vocab_size": 400,
        "llama.rope.freq_base": 1e6,
        "llama.rope.dimension_count": 8,
        "llama.attention.head_count": 8,
        "llama.attention.head_count_kv": 8,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.ggml.eot_token_id": 399,
        gguf.Keys.Tokenizer.FIM_PRE_ID: 396,
        gguf.Keys.Tokenizer.FIM_SUF_ID: 397,
        gguf.Keys.Tokenizer.FIM_MID_ID: 398,
        "tokenizer.ggml.prefix_token_id": 396,
        "tokenizer.ggml.suffix_token_id": 397,
        "tokenizer.ggml.middle_token_id": 398,
    }
    assert {key: value(key) for key in expected} == expected
    assert len(value("tokenizer.ggml.tokens")) == 400
    assert value("tokenizer.ggml.token_type")[396:] == [3, 3, 3, 3]  # CONTROL
    assert value("tokenizer.ggml.token_type")[:4] == [2, 3, 3, 6]
    assert all(tensor.data_offset % 32 == 0 for tensor in reader.tensors)


def test_tensors_stand_in_the_order_of_metas_rotation(path):
    tensors = {}
    for tensor in gguf.GGUFReader(path).tensors:
        name = to_meta_name(to_hf_name(tensor.name))
        tensors[name] = torch.from_numpy(tensor.data.copy())
    tokens = torch.tensor([1, 300, 299, 17, 3, 380, 250, 31, 8])
    expected = reference_logits(tensors, SMALL, tokens)
    torch.testing.assert_close(random_model()(tokens[None])[0], expected, rtol=1e-4, atol=1e-4)


def test_names_go_there_and_back():
    for name in tensor_shapes(SMALL):
        assert to_hf_name(to_gguf_name(name)) == name
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name in tensor_shapes(SMALL):
        assert names.get_name(name, try_suffixes=(".weight",)) == to_gguf_name(name)
    for name in ("rope_freqs.weight", "blk.x.attn_q.weight", "blk.0.attn_q.bias", "blk.²"):
        assert to_hf_name(name) is None


@pytest.mark.parametrize("name", BY_NAME)
def test_every_type_is_read(tmp_path, name):
    """A file with matrices of each type, whose blocks are random bytes with tame scales."""
    form = BY_NAME[name]
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    for key, value in write_config(WIDE).items():
        if isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
    expected = {}
    for hf_name, shape in tensor_shapes(WIDE).items():
        if len(shape) == 1:
            writer.add_tensor(to_gguf_name(hf_name), np.ones(shape, np.float32))
            continue
        kind = gguf.GGMLQuantizationType[name]
        if name in ("F32", "F16", "BF16"):
            values = rng.standard_normal(shape).astype(np.float32)
            data = gguf.quants.quantize(values, kind)
        else:
            row_bytes = shape[1] // form.n_values * form.n_bytes
            data = rng.integers(0, 256, (shape[0], row_bytes), dtype=np.uint8)
            scale = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
            blocks = data.reshape(-1, form.n_bytes)
            places = [form.n_bytes - 2] if name == "Q6_K" else [0]
            if name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K"):
                places.append(2)
            for place in places:
                blocks[:, place : place + 2] = scale
        writer.add_tensor(to_gguf_name(hf_name), data, raw_dtype=kind)
        expected[hf_name] = torch.from_numpy(gguf.quants.dequantize(data, kind).copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    weights = open_gguf(tmp_path / "x.gguf")
    assert weights.config == WIDE
    build_model(weights, dtype="float32")
    for hf_name, values in expected.items():
        got = weights.read(hf_name, torch.float32)
        if hf_name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = values.view(8, 16, 2, 256)
            values = torch.cat((heads[:, :, 0], heads[:, :, 1]), dim=1).view(256, 256)
        assert torch.equal(got, values)


# -- damage -------------------------------------------------------------------------------------


def header(n_tensors=0, keys=b"", n_keys=0, version=3, magic=b"GGUF", rest=b""):
    return magic + struct.pack("<IQQ", version, n_tensors, n_keys) + keys + rest


def key(name, kind, payload):
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + payload


def entry(name=b"t", sizes=(32,), kind=0, offset=0):
    out = struct.pack("<Q", len(name)) + name + struct.pack("<I", len(sizes))
    return out + struct.pack(f"<{len(sizes)}Q", *sizes) + struct.pack("<IQ", kind, offset)


HUGE = 2**63 + 8
DAMAGE = {
    "empty": (b"", "empty file"),
    "magic": (header(magic=b"GGML"), "begins with b'GGML'"),
    "version 1": (header(version=1), "version 1;"),
    "big endian": (header(version=3 << 24), "version 50331648"),
    "short": (b"GGUF\x03\0\0\0", "cut short"),
    "many tensors": (header(n_tensors=HUGE), f"{HUGE} tensors"),
    "many keys": (header(n_keys=2**40), "metadata keys; at most"),
    "long key": (header(n_keys=1, keys=struct.pack("<Q", 2**50)), "cut short"),
    "long string": (header(n_keys=1, keys=key(b"k", 8, struct.pack("<Q", HUGE))), "cut short"),
    "unknown type": (header(n_keys=1, keys=key(b"k", 13, bytes(8))), "value type 13"),
    "array of arrays": (header(n_keys=1, keys=key(b"k", 9, struct.pack("<IQ", 9, 1))), "type 9"),
    "huge array": (header(n_keys=1, keys=key(b"k", 9, struct.pack("<IQ", 10, 2**61))), "cut short"),
    "huge strings": (header(n_keys=1, keys=key(b"k", 9, struct.pack("<IQ", 8, 2**60))), "strings"),
    "twice": (header(n_keys=2, keys=key(b"k", 0, b"1") * 2), "'k' occurs twice"),
    "not UTF-8": (header(n_keys=1, keys=key(b"\xff", 0, b"1")), "not valid UTF-8"),
    "alignment 0": (header(n_keys=1, keys=key(b"general.alignment", 4, bytes(4))), "alignment = 0"),
    "alignment 48": (
        header(n_keys=1, keys=key(b"general.alignment", 4, struct.pack("<I", 48))),
        "power of two",
    ),
    "alignment 2 GiB": (
        header(n_keys=1, keys=key(b"general.alignment", 4, struct.pack("<I", 1 << 31))),
        "alignment = 2147483648",
    ),
    "5 dimensions": (header(1, rest=entry(sizes=(1, 1, 1, 1, 32))), "has 5 dimensions"),
    "0 dimensions": (header(1, rest=entry(sizes=())), "has 0 dimensions"),
    "size 0": (header(1, rest=entry(sizes=(32, 0))), "impossible shape"),
    "overflow": (header(1, rest=entry(sizes=(2**32, 2**32, 2**32))), "ends at byte"),
    "half a block": (header(1, rest=entry(sizes=(33,), kind=8)), "impossible shape"),
    "tensor type": (header(1, rest=entry(kind=10)), "has type 10; accepted: F32"),
    "offset": (header(1, rest=entry(offset=5)), "no multiple of 32"),
    "behind the end": (header(1, rest=entry(offset=2**40)), "ends at byte"),
    "same name": (header(2, rest=entry() + entry(offset=128) + bytes(400)), "occurs twice"),
    "overlap": (header(2, rest=entry() + entry(b"u", offset=64) + bytes(400)), "'u' overlaps"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_one_clear_line(tmp_path, case):
    data, message = DAMAGE[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"bad\.gguf: ") as error:
        read_directory(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kept", [0, 3, 20, 200, 5000, 20000, -1])
def test_truncated(path, tmp_path, kept):
    short = tmp_path / "short.gguf"
    short.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"short\.gguf"):
        load(short)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "falcon"}, "only 'llama'"),
        ({"llama.embedding_length": None}, "'llama.embedding_length' is missing"),
        ({"llama.embedding_length": 128}, "but a head has 16"),
        ({"llama.block_count": 3}, "model.layers.2"),
        ({"llama.block_count": 10**7}, "asks for 10000000 layers"),
        ({"llama.attention.head_count": "many"}, "expected a number"),
        ({"llama.attention.head_count": 0}, "num_attention_heads = 0"),
        ({"llama.rope.dimension_count": 4}, "but a head has 8"),
        ({"llama.rope.freq_base": float("nan")}, "rope_theta"),
        ({"llama.rope.scaling.type": "linear"}, "rope.scaling.type"),
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"tokenizer.ggml.model": "gpt2"}, "only 'llama' is accepted"),
        ({"tokenizer.ggml.scores": np.zeros(3, np.float32)}, "expected 400 numbers"),
        ({"tokenizer.ggml.scores": np.full(400, np.nan, np.float32)}, "not a finite"),
        ({"tokenizer.ggml.tokens": None}, "tokens is missing"),
        ({"tokenizer.ggml.tokens": ["a"] * 400}, "ids 0, 1, 2"),
        ({"tokenizer.ggml.bos_token_id": 5}, "bos_token_id = 5"),
    ],
)
def test_metadata_that_makes_no_sense(path, tmp_path, changes, message):
    directory = read_directory(path)
    data = path.read_bytes()
    metadata = {k: v for k, v in (directory.metadata | changes).items() if v is not None}
    places = directory.tensors.values()
    bad = tmp_path / "bad.gguf"
    write_gguf(
        bad,
        metadata,
        {name: place[:2] for name, place in directory.tensors.items()},
        [memoryview(data)[offset : offset + size] for _, _, offset, size in places],
    )
    with pytest.raises(ValueError, match=r"bad\.gguf") as error:
        load(bad)
    assert message in str(error.value)


def test_a_tensor_of_another_model(path, tmp_path):
    directory = read_directory(path)
    bad = tmp_path / "bad.gguf"
    write_gguf(
        bad,
        directory.metadata,
        {"rope_freqs.weight": (BY_NAME["F32"], (4,))},
        [memoryview(bytes(16))],
    )
    with pytest.raises(ValueError, match=r"token_embd\.weight' is missing"):
        load(bad)
