"""The tokenizer files of a checkpoint folder, as Transformers, vLLM and llama.cpp read them.

`tokenizer.json` is built so that the ids are ours: merges in the order of SentencePiece's scores,
the dummy prefix in front of every text between special tokens, bytes as the fallback. It is loaded
as it stands (`PreTrainedTokenizerFast`); Transformers' own Llama class would rebuild it and lose
the first of two leading spaces. Two differences remain, both of that format: the text of a special
token ("<s>") turns into its id, and U+2581 is taken for a space.

The other way round, a tokenizer.json of the Llama kind is read, because what Transformers 5 saves
has no tokenizer.model any more.

Files out: tokenizer.model, tokenizer.json, tokenizer_config.json, special_tokens_map.json.
Files in: tokenizer.json, tokenizer_config.json, chat_template.jinja.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .model_file import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, ModelFile, Piece

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

# After each exchange of a dialog comes BOS again, and each text gets its dummy prefix.
INST_TEMPLATE = """\
{%- if messages[0]['role'] == 'system' -%}
{%- set turns = messages[1:] -%}
{%- set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' -%}
{%- else -%}
{%- set turns = messages -%}
{%- set system = '' -%}
{%- endif -%}
{%- for message in turns -%}
{%- if message['role'] != ['user', 'assistant'][loop.index0 % 2] -%}
{{- raise_exception('after an optional system message, user and assistant alternate') -}}
{%- elif message['role'] == 'user' -%}
{%- set asked = (system if loop.first else '') + message['content'] -%}
{{- bos_token + '[INST] ' + asked.strip() + ' [/INST]' -}}
{%- else -%}
{{- ' ' + message['content'].strip() + ' ' + eos_token -}}
{%- endif -%}
{%- endfor -%}"""

# The reference puts an empty system message first; the template of the released folder forgot it.
SOURCE_TEMPLATE = """\
{{- bos_token -}}
{%- if messages[0]['role'] == 'system' -%}
{%- set first = 1 -%}
{%- else -%}
{%- set first = 0 -%}
{{- ' Source: system<step>' -}}
{%- endif -%}
{%- for message in messages -%}
{%- set n = loop.index0 - first -%}
{%- if n >= 0 and message['role'] != ['user', 'assistant'][n % 2] -%}
{{- raise_exception('after an optional system message, user and assistant alternate') -}}
{%- endif -%}
{{- ' Source: ' + message['role'] -}}
{%- if message['destination'] -%}{{- '\\nDestination: ' + message['destination'] -}}{%- endif -%}
{%- if message['content'] -%}{{- '\\n\\n ' + message['content'].strip() -}}{%- endif -%}
{{- '<step>' -}}
{%- endfor -%}
{%- if messages[-1]['role'] == 'user' -%}
{{- ' Source: assistant\\nDestination: user\\n\\n ' -}}
{%- endif -%}"""

TEMPLATES = {"inst": INST_TEMPLATE, "source": SOURCE_TEMPLATE}


def write_files(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the four files; each appears whole or not at all.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / "tokenizer.model", tokenizer.file.to_bytes())
    for name, value in (
        ("tokenizer.json", tokenizer_json(tokenizer.file)),
        ("tokenizer_config.json", tokenizer_config(tokenizer)),
        ("special_tokens_map.json", _SPECIAL_TOKENS),
    ):
        _replace(folder / name, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def tokenizer_json(file: ModelFile) -> dict[str, Any]:
    """The content of tokenizer.json, as the tokenizers library defines it."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Prepend", "prepend": "▁"}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    decoders = [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, **token} for i, token in _special_tokens(file).items()],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [prepend, replace] if file.add_dummy_prefix else [replace],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                bos,
                {"Sequence": {"id": "A", "type_id": 0}},
                bos,
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [*decoders, strip] if file.add_dummy_prefix else decoders,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece.text: i for i, piece in enumerate(file.pieces)},
            "merges": _merges(file),
        },
    }


def tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of tokenizer_config.json; null infilling tokens mean a model without them."""
    names = {"prefix_token": tokenizer.prefix_id, "suffix_token": tokenizer.suffix_id}
    names |= {"middle_token": tokenizer.middle_id, "eot_token": tokenizer.eot_id}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        **_SPECIAL_TOKENS,
        **{name: None if i is None else tokenizer.piece(i) for name, i in names.items()},
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {str(i): t for i, t in _special_tokens(tokenizer.file).items()},
    }
    if tokenizer.chat_format is not None:
        config["chat_template"] = TEMPLATES[tokenizer.chat_format]
    return config


def read_config(folder: Path) -> dict[str, Any]:
    """The content of tokenizer_config.json, with the chat template wherever the folder keeps it.

    Raises:
        ValueError: not readable.
    """
    path = folder / "tokenizer_config.json"
    config = _read_object(path) if path.exists() else {}
    template = folder / "chat_template.jinja"
    if template.exists():
        try:
            config["chat_template"] = template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{template}: not readable: {error}") from None
    return config


def read_tokenizer_json(path: Path) -> ModelFile:
    """The vocabulary in a tokenizer.json that was made from a Llama tokenizer.model.

    Raises:
        ValueError: not readable, or another kind of tokenizer.
    """
    value = _read_object(path)
    try:
        file = _parse_tokenizer_json(value)
        file.check()
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: not a tokenizer of the Llama kind: {error!r}") from None
    return file


def _parse_tokenizer_json(value: dict[str, Any]) -> ModelFile:
    model, added = value["model"], {token["id"]: token for token in value["added_tokens"]}
    names = {i: text for text, i in model["vocab"].items()}
    names |= {i: token["content"] for i, token in added.items()}
    scores: dict[str, float] = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        scores.setdefault(left + right, -float(rank))
    pieces: list[Piece] = []
    for i in range(len(names)):
        text = names[i]
        if i < 3:
            kind = CONTROL if i else UNKNOWN
        elif i < 259:
            kind = BYTE
        elif i in added:
            kind = CONTROL if added[i]["special"] else USER_DEFINED
        else:
            kind = NORMAL if text in scores or len(text) == 1 else UNUSED
        pieces.append(Piece(text, scores.get(text, 0.0), kind))
    normalizer = value["normalizer"] or {}
    steps = [normalizer, *normalizer.get("normalizers", []), value["pre_tokenizer"] or {}]
    prepends = [step for step in steps if step.get("type") in ("Prepend", "Metaspace")]
    dummy = any(step.get("prepend_scheme") != "never" for step in prepends)
    return ModelFile(tuple(pieces), dummy)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")
    return value


_SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def _special_tokens(file: ModelFile) -> dict[int, dict[str, Any]]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        i: {"content": piece.text, **flags, "special": True}
        for i, piece in enumerate(file.pieces)
        if piece.kind in (UNKNOWN, CONTROL)
    }


def _merges(file: ModelFile) -> list[list[str]]:
    """Every way to put a piece together, best score first.

    Among pieces of one score (the runs of blanks) the longer left part goes first: that makes a run
    grow from the left, as SentencePiece does it.
    """
    scores = {p.text: p.score for p in file.pieces if p.kind in (NORMAL, USER_DEFINED)}
    merges = [
        (score, n, len(text) - n, text)
        for text, score in scores.items()
        for n in range(1, len(text))
        if text[:n] in scores and text[n:] in scores
    ]
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    return [[text[:n], text[n:]] for _, n, _, text in merges]


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
