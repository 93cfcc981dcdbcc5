"""The SentencePiece model file as plain values that can be read, changed and written.

Only the few fields that a Llama tokenizer depends on are interpreted; the trainer settings are
carried along byte for byte. The file is a protocol buffer; its wire format is small enough that
the protobuf runtime (whose generated classes are tied to its version) is not needed for it.

File in and out: tokenizer.model.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # sentencepiece_model.proto

MAX_FILE_BYTES = 64 << 20  # the largest SentencePiece files in use have 256k pieces, about 5 MB
_BPE = 2  # TrainerSpec.ModelType


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its id is its position."""

    text: str
    score: float = 0.0
    kind: int = NORMAL


@dataclass(frozen=True)
class ModelFile:
    """A BPE vocabulary with byte fallback, and how text is prepared for it."""

    pieces: tuple[Piece, ...]
    add_dummy_prefix: bool = True
    trainer_spec: bytes = field(default=b"", repr=False)

    @classmethod
    def read(cls, path: str | Path) -> ModelFile:
        """Read a tokenizer.model file.

        Raises:
            ValueError: the file is missing, or is not a SentencePiece BPE model of the Llama kind.
        """
        path = Path(path)
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise ValueError(
                    f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB, not a tokenizer.model"
                )
            data = path.read_bytes()
        except OSError as error:
            raise ValueError(f"{path}: cannot read the tokenizer: {error.strerror}") from None
        try:
            return cls.parse(data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def parse(cls, data: bytes) -> ModelFile:
        """Interpret the bytes of a tokenizer.model file.

        Raises:
            ValueError: the bytes are damaged or hold another kind of tokenizer.
        """
        pieces: list[Piece] = []
        trainer_spec = normalizer_spec = b""
        for number, value in _fields(data):
            if number == 1:
                pieces.append(_parse_piece(_bytes(value)))
            elif number == 2:
                trainer_spec = _bytes(value)
            elif number == 3:
                normalizer_spec = _bytes(value)
        trainer = dict(_fields(trainer_spec))
        normalizer = dict(_fields(normalizer_spec))
        if trainer.get(3) != _BPE or not trainer.get(35):
            raise ValueError("not a SentencePiece BPE model with byte fallback, as Llama's is")
        if normalizer.get(2) or normalizer.get(4, 1) or not normalizer.get(5, 1):
            raise ValueError("its normaliser changes the text; Llama's is the identity")
        file = cls(tuple(pieces), bool(normalizer.get(3, 1)), trainer_spec)
        file.check()
        return file

    def check(self) -> None:
        """Verify the layout that the rest of the code relies on.

        Raises:
            ValueError: a control id or byte is not where Llama has it, or a piece occurs twice.
        """
        names = [piece.text for piece in self.pieces[:3]]
        if names != ["<unk>", "<s>", "</s>"]:
            raise ValueError(f"ids 0, 1, 2 are {names}, not <unk>, <s>, </s>")
        if [piece.kind for piece in self.pieces[:3]] != [UNKNOWN, CONTROL, CONTROL]:
            raise ValueError("<unk>, <s>, </s> are not marked as unknown and control pieces")
        for byte in range(256):
            if self.pieces[3 + byte : 4 + byte] != (Piece(f"<0x{byte:02X}>", 0.0, BYTE),):
                raise ValueError(f"id {3 + byte} is not the piece of byte {byte}")
        seen: set[str] = set()
        for i, piece in enumerate(self.pieces):
            if not piece.text or piece.text in seen:
                raise ValueError(f"id {i}: piece {piece.text!r} is empty or occurs twice")
            if i > 258 and piece.kind not in (NORMAL, CONTROL, USER_DEFINED, UNUSED):
                raise ValueError(
                    f"id {i}: piece {piece.text!r} has the unexpected type {piece.kind}"
                )
            seen.add(piece.text)

    def to_bytes(self) -> bytes:
        """The content of a tokenizer.model file."""
        out = bytearray()
        for piece in self.pieces:
            text = piece.text.encode()
            body = b"\x0a" + _varint(len(text)) + text + b"\x15" + struct.pack("<f", piece.score)
            if piece.kind != NORMAL:
                body += b"\x18" + _varint(piece.kind)
            out += b"\x0a" + _varint(len(body)) + body
        spec = self.trainer_spec or b"\x18\x02\x98\x02\x01"  # BPE with byte fallback
        out += b"\x12" + _varint(len(spec)) + spec
        dummy = b"\x01" if self.add_dummy_prefix else b"\x00"
        norm = b"\x0a\x08identity\x12\x00\x18" + dummy + b"\x20\x00\x32\x00"
        out += b"\x1a" + _varint(len(norm)) + norm
        return bytes(out)

    def with_pieces(self, pieces: list[Piece] | tuple[Piece, ...]) -> ModelFile:
        """The same settings over another vocabulary."""
        return replace(self, pieces=tuple(pieces))


def _parse_piece(data: bytes) -> Piece:
    values = dict(_fields(data))
    score = values.get(2, b"\0\0\0\0")
    kind = values.get(3, NORMAL)
    if not isinstance(score, bytes) or len(score) != 4 or not isinstance(kind, int):
        raise ValueError("a piece is damaged")
    value = struct.unpack("<f", score)[0]
    if value != value:
        raise ValueError("a piece has no valid score")
    try:
        return Piece(_bytes(values.get(1, b"")).decode(), value, kind)
    except UnicodeDecodeError:
        raise ValueError("a piece is not valid UTF-8") from None


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("not a SentencePiece model file")
    return value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
        shift += 7
    raise ValueError("not a SentencePiece model file, or cut short")


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field number and raw value (integer, or the bytes of a fixed or counted field)."""
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _read_varint(data, at)
            yield key >> 3, value
            continue
        size = {1: 8, 5: 4}.get(kind)
        if kind == 2:
            size, at = _read_varint(data, at)
        if size is None or at + size > len(data):
            raise ValueError("not a SentencePiece model file, or cut short")
        yield key >> 3, data[at : at + size]
        at += size
