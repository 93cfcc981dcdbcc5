"""Grammars: which tokens may come next so that a text conforms to a JSON schema or an expression.

llguidance does the work, over the bytes of our vocabulary. A grammar is compiled once and copied
for each sequence. Between values stands what `json.dumps` writes and nothing else, so that a small
model cannot fill its answer with spaces.
"""

from __future__ import annotations

import functools
import json

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from codellama.engine.sampling import SamplingParams
from codellama.tokenizer import Tokenizer


class _Vocabulary:
    """A tokenizer in the form that llguidance reads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.bos_token_id, self.eos_token_id = tokenizer.bos_id, tokenizer.eos_id
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        unwritten = [i for i, data in enumerate(self.tokens) if not data]
        self.special_token_ids = [tokenizer.unk_id, *unwritten]
        self._tokenizer = tokenizer

    def __call__(self, data: bytes) -> list[int]:
        text = data.decode("utf-8", "surrogateescape")
        return self._tokenizer.encode_without_prefix_space(text)


@functools.lru_cache(maxsize=8)
def _vocabulary(tokenizer: Tokenizer) -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer)))


@functools.lru_cache(maxsize=64)
def _compiled(tokenizer: Tokenizer, schema: str | None, regex: str | None) -> LLMatcher:
    if schema is None:
        grammar = LLMatcher.grammar_from_regex(regex or "")
    else:
        grammar = LLMatcher.grammar_from_json_schema(
            json.loads(schema) or {"type": "object"},
            overrides={"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
        )
    limits = LLParserLimits(verbose_errors=False)
    matcher = LLMatcher(_vocabulary(tokenizer), grammar, log_level=0, limits=limits)
    if matcher.is_error():
        reason = " ".join(matcher.get_error().split())[:200]
        what = ("regex", regex) if schema is None else ("schema", schema)
        kind = "regular expression" if schema is None else "JSON schema"
        raise ValueError(
            f"{what[0]} {str(what[1])[:80]!r}: not a {kind} that can be kept to: {reason}"
        )
    return matcher


def matcher_of(tokenizer: Tokenizer, params: SamplingParams) -> LLMatcher:
    """A matcher at the beginning of a text that is to conform to a schema or an expression.

    Raises:
        ValueError: it is wrong, or has something that is not supported; names it.
    """
    return _compiled(tokenizer, params.schema, params.regex).deep_copy()
