"""The vocabulary of a GGUF file describes the same tokenizer."""

import numpy as np
import pytest

from codellama.tokenizer import Tokenizer
from codellama.tokenizer.gguf_vocabulary import from_gguf, to_gguf
from codellama.tokenizer.huggingface import TEMPLATES
from codellama.tokenizer.model_file import BYTE

TEXTS = [
    "def f(x):\n    return x\n",
    "  two  spaces",
    "ä → 日本 🎉",
    " <PRE> <EOT><step>",
    "\t\r\n",
    "",
]


def test_round_trip(tokenizer):
    again = from_gguf(to_gguf(tokenizer))
    assert [p.text for p in again.file.pieces] == [p.text for p in tokenizer.file.pieces]
    assert [p.kind for p in again.file.pieces] == [p.kind for p in tokenizer.file.pieces]
    for text in TEXTS:
        assert again.encode(text, bos=True) == tokenizer.encode(text, bos=True)
    for name in (
        "chat_format",
        "supports_infilling",
        "prefix_id",
        "eot_id",
        "step_id",
        "vocab_size",
    ):
        assert getattr(again, name) == getattr(tokenizer, name)
    assert again.add_dummy_prefix == tokenizer.add_dummy_prefix


def test_ids_of_code_llama(llama):
    metadata = to_gguf(llama)
    names = ("fim_pre", "fim_suf", "fim_mid", "prefix", "suffix", "middle", "eot", "bos", "eos")
    ids = [metadata[f"tokenizer.ggml.{name}_token_id"] for name in names]
    assert ids == [32007, 32008, 32009, 32007, 32008, 32009, 32010, 1, 2]
    assert metadata["tokenizer.ggml.token_type"][32007:32011].tolist() == [3, 3, 3, 3]
    assert "tokenizer.chat_template" not in metadata


def test_the_70b_chat_model_ends_at_both(llama_70b):
    metadata = to_gguf(llama_70b)
    assert metadata["tokenizer.ggml.eot_token_id"] == 32010
    assert metadata["tokenizer.ggml.eom_token_id"] == 32015  # <step>
    assert metadata["tokenizer.ggml.add_space_prefix"] is False
    assert metadata["tokenizer.chat_template"] == TEMPLATES["source"]


def test_chat_and_infilling_are_kept(small_tokenizer):
    chat = from_gguf(to_gguf(small_tokenizer.with_chat_format("inst")))
    assert chat.chat_format == "inst"
    silent = Tokenizer(small_tokenizer.file, infilling=False)
    assert not from_gguf(to_gguf(silent)).supports_infilling


def test_files_of_other_converters(small_tokenizer):
    metadata = to_gguf(small_tokenizer)
    for name in ("fim_pre_token_id", "eot_token_id", "add_space_prefix", "padding_token_id"):
        del metadata[f"tokenizer.ggml.{name}"]
    del metadata["codellama.infilling"]
    scores = metadata["tokenizer.ggml.scores"]
    scores[metadata["tokenizer.ggml.token_type"] == BYTE] = -1000.0
    other = from_gguf(metadata)
    assert other.supports_infilling
    assert other.eot_id == small_tokenizer.eot_id
    assert other.encode("def f(é)") == small_tokenizer.encode("def f(é)")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", "gpt2", "only 'llama'"),
        ("tokens", ["a"], "expected 1 numbers"),
        ("tokens", 3, "no list of strings"),
        ("scores", None, "scores: expected"),
        ("token_type", np.zeros(3, np.int32), "token_type: expected"),
        ("eos_token_id", 7, "eos_token_id = 7"),
    ],
)
def test_damage(small_tokenizer, key, value, message):
    metadata = to_gguf(small_tokenizer) | {f"tokenizer.ggml.{key}": value}
    with pytest.raises(ValueError, match=message):
        from_gguf(metadata)
