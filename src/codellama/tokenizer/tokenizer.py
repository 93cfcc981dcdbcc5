"""Text to ids and back: the Llama tokenizer, its Code Llama variants, and a streaming decoder.

SentencePiece does the work. Added here: the infilling and `<step>` ids as control ids that no text
can produce, exact round trips for every text and every byte string, decoding in the context of a
prompt, and thread safety (a tokenizer never changes after it was built). Prompt formats are in
`infilling` and `chat`; training a vocabulary is in `training`, the Hugging Face files in
`huggingface`.

Files in and out: tokenizer.model, or a folder that holds one.
"""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sentencepiece

from .model_file import CONTROL, NORMAL, UNUSED, USER_DEFINED, ModelFile
from .variants import EOT, MIDDLE, PREFIX, STEP, SUFFIX, Variant, apply_variant, protect

if TYPE_CHECKING:
    from .chat import Message

MARKER = "▁"  # U+2581, how SentencePiece writes a space
_CHUNK_CHARS = 1_000  # whole lines; SentencePiece slows down by half on long texts
_UNUSUAL = re.compile("[\u2581\ud800-\udfff]+")


class Tokenizer:
    """Text to ids and back; safe to share between threads.

    `bos_id`, `eos_id`, `unk_id`: always there. `prefix_id`, `suffix_id`, `middle_id`, `eot_id`,
    `step_id`: None where the vocabulary lacks them. `chat_format`: "inst", "source", or None where
    nothing says that the model was trained to chat. `add_dummy_prefix`: whether `encode` puts one
    space before a text. `file`: the vocabulary as values.
    """

    unk_id, bos_id, eos_id = 0, 1, 2

    def __init__(self, file: ModelFile, chat_format: str | None = None, infilling: bool = True):
        file.check()
        self.file = protect(file)
        # Without the dummy prefix, encode(" " + text) equals what SentencePiece does with it.
        plain = ModelFile(self.file.pieces, False, self.file.trainer_spec)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=plain.to_bytes())
        except RuntimeError as error:
            raise ValueError(f"SentencePiece refuses the vocabulary: {error}") from None
        self.add_dummy_prefix = file.add_dummy_prefix
        self.vocab_size = len(file.pieces)
        self._bytes: list[bytes] = []
        self._marked: list[bool] = []  # the piece begins with a marker that a text start loses
        for i, piece in enumerate(self.file.pieces):
            if piece.kind in (NORMAL, UNUSED, USER_DEFINED):
                self._bytes.append(piece.text.replace(MARKER, " ").encode())
            elif 3 <= i < 259:
                self._bytes.append(bytes([i - 3]))
            else:
                self._bytes.append(b"" if piece.kind == CONTROL else " \u2047 ".encode())
            self._marked.append(self._bytes[i][:1] == b" " and i > 258)
        ids = {p.text: i for i, p in enumerate(self.file.pieces) if p.kind == CONTROL}
        self.supports_infilling = infilling and {PREFIX, SUFFIX, MIDDLE, EOT} <= ids.keys()
        known = ids if self.supports_infilling else {}
        self.prefix_id, self.suffix_id = known.get(PREFIX), known.get(SUFFIX)
        self.middle_id, self.eot_id = known.get(MIDDLE), known.get(EOT)
        self.step_id = ids.get(STEP)
        self.chat_format = "source" if self.step_id is not None else chat_format
        # No piece reaches over a newline, so lines can be encoded one by one with the same result.
        self._by_line = not any("\n" in piece.text for piece in self.file.pieces)

    @classmethod
    def load(cls, path: str | Path, variant: str | None = None) -> Tokenizer:
        """Load a tokenizer.model file, or the one in a checkpoint folder; else its tokenizer.json.

        `variant`, such as "7b" or "CodeLlama-70b-Instruct-hf", adds the ids of that model to a
        plain Llama 2 file and sets the chat format; without it the file is taken as it is.

        Raises:
            ValueError: nothing there, damaged, another kind of tokenizer, an unknown variant, or
                one that contradicts the file.
        """
        from .huggingface import read_config, read_tokenizer_json

        known = None if variant is None else Variant.named(variant)
        path = Path(path)
        config: dict[str, Any] = {}
        if path.is_dir():
            config = read_config(path)
            names = ("tokenizer.model", "tokenizer.json")
            path = next((path / name for name in names if (path / name).exists()), path / names[0])
        if path.suffix == ".json":
            file = read_tokenizer_json(path)
        else:
            file = ModelFile.read(path)
        if known is not None:
            try:
                file = apply_variant(file, known)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
            return cls(file, known.chat_format, known.infilling)
        chat_format = "inst" if "[INST]" in str(config.get("chat_template")) else None
        # A null prefix token is how Hugging Face folders say that a model does not infill.
        return cls(file, chat_format, infilling=config.get("prefix_token", "") is not None)

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, path: str | Path | None = None
    ) -> Tokenizer:
        """Learn `vocab_size` pieces with Llama's settings and add the four infilling ids above.

        The result has `vocab_size + 4` ids; it is written to `path` (a folder) where given.

        Raises:
            ValueError: the texts are too few for that many pieces.
        """
        from .training import train_model_file

        tokenizer = cls(train_model_file(texts, vocab_size))
        if path is not None:
            tokenizer.save(path)
        return tokenizer

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.model and the Hugging Face tokenizer files into a folder."""
        from .huggingface import write_files

        write_files(self, Path(folder))

    def with_chat_format(self, chat_format: str | None) -> Tokenizer:
        """Return the same vocabulary for a model trained to chat; `save` then adds the template.

        Raises:
            ValueError: not "inst", and `<step>` decides over "source".
        """
        if self.step_id is not None or chat_format not in ("inst", None):
            raise ValueError(f'chat format {chat_format!r}: only "inst" or None can be set')
        return Tokenizer(self.file, chat_format, self.supports_infilling)

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Return the ids of a text; an empty text has none.

        Characters U+DC80 to U+DCFF stand for bytes that are not UTF-8 (`surrogateescape`).

        Raises:
            ValueError: the text holds another half of a surrogate pair.
        """
        if self.add_dummy_prefix and text:
            text = " " + text
        ids = self._encode(text)
        if bos:
            ids.insert(0, self.bos_id)
        if eos:
            ids.append(self.eos_id)
        return ids

    def encode_without_prefix_space(self, text: str) -> list[int]:
        """Return the ids of a text that continues another one (E0 in the fact sheet)."""
        return self._encode(text)

    def encode_bytes(self, data: bytes, bos: bool = False, eos: bool = False) -> list[int]:
        """Return the ids of a file's bytes; what is not UTF-8 becomes byte pieces."""
        return self.encode(data.decode("utf-8", "surrogateescape"), bos, eos)

    def encode_batch(
        self, texts: Iterable[str], bos: bool = False, eos: bool = False
    ) -> list[list[int]]:
        """Return the ids of many texts, encoded on all cores."""
        texts = list(texts)
        results: list[list[int]] = []
        chunks: list[str] = []
        owners: list[list[int]] = []
        for text in texts:
            ids: list[int] = []
            if _is_unusual(text):
                ids = self.encode(text)
            elif text:
                parts = self._chunks(" " + text if self.add_dummy_prefix else text)
                chunks += parts
                owners += [ids] * len(parts)
            results.append(ids)
        encoded = self._processor.encode(chunks, num_threads=os.cpu_count() or 1)
        for ids, part in zip(owners, encoded, strict=True):
            ids += part
        if bos or eos:
            first, last = [self.bos_id] * bos, [self.eos_id] * eos
            return [first + ids + last for ids in results]
        return results

    def decode(self, ids: Iterable[int], keep_leading_space: bool = False) -> str:
        """Return the text of ids; control ids have none.

        The space that `encode` put in front is dropped unless `keep_leading_space`. Each byte that
        is not part of a valid character becomes U+FFFD.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        return self.decode_bytes(ids, keep_leading_space).decode("utf-8", _ONE_EACH)

    def decode_infilling(self, ids: Iterable[int]) -> str:
        """Return the text of ids that continue another text: a leading space is real."""
        return self.decode(ids, keep_leading_space=True)

    def decode_bytes(self, ids: Iterable[int], keep_leading_space: bool = False) -> bytes:
        """Return the bytes of ids, valid UTF-8 or not."""
        ids = list(ids)
        if ids and min(ids) < 0:
            raise ValueError(f"id {min(ids)} is outside the vocabulary of {self.vocab_size}")
        try:
            data = b"".join([self._bytes[i] for i in ids])
        except IndexError:
            raise ValueError(
                f"id {max(ids)} is outside the vocabulary of {self.vocab_size}"
            ) from None
        if not keep_leading_space and self.add_dummy_prefix and data[:1] == b" ":
            first = next(i for i in ids if self._bytes[i])
            data = data[self._marked[first] :]
        return data

    def starts_text(self, prompt: Sequence[int]) -> bool:
        """Whether ids generated after this prompt begin a text, so that a first space is no text.

        True after BOS alone, and after an infilling prompt without a prefix, where training put
        E(prefix + middle). Pass the result as `skip_leading_space`.
        """
        prompt = list(prompt)
        if self.supports_infilling and self.prefix_id in prompt and self.middle_id in prompt:
            start = len(prompt) - prompt[::-1].index(self.prefix_id)
            if self.suffix_id in prompt[start:]:
                end = prompt.index(self.suffix_id, start)
                middle = len(prompt) - prompt[::-1].index(self.middle_id)
                prompt = prompt[start:end] + prompt[middle:]
        return not any(self._bytes[i] for i in prompt)

    def piece(self, token_id: int) -> str:
        """Return the vocabulary entry of an id."""
        return self.file.pieces[self._checked(token_id)].text

    def token_bytes(self, token_id: int) -> bytes:
        """Return what an id adds to a text, in bytes: nothing for control ids."""
        return self._bytes[self._checked(token_id)]

    def encode_infilling(self, prefix: str, suffix: str, suffix_first: bool = False) -> list[int]:
        """Return the prompt whose continuation is the text between prefix and suffix."""
        from .infilling import infilling_prompt

        return infilling_prompt(self, prefix, suffix, suffix_first)

    def encode_dialog(self, messages: Sequence[Message]) -> list[int]:
        """Return the prompt whose continuation is the assistant's next message."""
        from .chat import dialog_prompt

        return dialog_prompt(self, messages)

    def _checked(self, token_id: int) -> int:
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"id {token_id} is outside the vocabulary of {self.vocab_size}")
        return token_id

    def _encode(self, text: str) -> list[int]:
        if not _is_unusual(text):
            return self._encode_plain(text)
        ids: list[int] = []
        at = 0
        for match in _UNUSUAL.finditer(text):
            ids += self._encode_plain(text[at : match.start()])
            at = match.end()
            try:
                data = match.group().encode("utf-8", "surrogateescape")
            except UnicodeEncodeError as error:
                code = f"U+{ord(match.group()[error.start]):04X}"
                raise ValueError(f"the text holds {code}, half of a surrogate pair") from None
            # SentencePiece would read U+2581 as a space; as bytes it comes back as itself.
            ids += [byte + 3 for byte in data]
        return ids + self._encode_plain(text[at:])

    def _encode_plain(self, text: str) -> list[int]:
        if len(text) <= _CHUNK_CHARS:
            return self._processor.encode(text)
        ids: list[int] = []
        for chunk in self._chunks(text):
            ids += self._processor.encode(chunk)
        return ids

    def _chunks(self, text: str) -> list[str]:
        """Cut a text after newlines, where no piece reaches across."""
        if not self._by_line:
            return [text]
        chunks: list[str] = []
        start = 0
        while start < len(text):
            end = text.find("\n", start + _CHUNK_CHARS) + 1 or len(text)
            chunks.append(text[start:end])
            start = end
        return chunks

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self.file, self.chat_format, self.supports_infilling)


def _is_unusual(text: str) -> bool:
    """Whether SentencePiece would change or refuse a character; costs nothing for ASCII."""
    return not text.isascii() and _UNUSUAL.search(text) is not None


class StreamDecoder:
    """Turns ids that arrive one by one into text; characters are emitted only when whole.

    All pieces joined equal `tokenizer.decode(ids, keep_leading_space=not skip_leading_space)`.
    For ids that continue a prompt pass `skip_leading_space=tokenizer.starts_text(prompt)`: what
    comes out is then exactly what the ids add to the text of the prompt.
    """

    def __init__(self, tokenizer: Tokenizer, skip_leading_space: bool = True):
        self._tokenizer = tokenizer
        self._skip = skip_leading_space and tokenizer.add_dummy_prefix
        self._decoder = codecs.getincrementaldecoder("utf-8")(_ONE_EACH)

    def push(self, token_id: int) -> str:
        """Return the text that became certain with this id, maybe none."""
        data = self._tokenizer.token_bytes(token_id)
        if self._skip and data:
            self._skip = False
            data = data[self._tokenizer._marked[token_id] :]
        return self._decoder.decode(data)

    def flush(self) -> str:
        """Return what is left at the end: U+FFFD for each byte of an unfinished character."""
        return self._decoder.decode(b"", final=True)


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    # Python's own "replace" writes one U+FFFD for several bytes; SentencePiece one for each.
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


_ONE_EACH = "codellama.replace"
codecs.register_error(_ONE_EACH, _replace_each_byte)
