"""Learning a vocabulary with the settings of Llama's, plus the four infilling pieces.

Texts in, vocabulary out. Three things of Llama's file need care: no piece holds a newline (texts
are learned from line by line); the runs of 2 to 16 blanks, which make up Python's indentation, are
all there and merged last, so that "    def" is a run of blanks and then " def"; and single
characters take one piece in 15, the rarer ones being left to the bytes.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Iterator

import sentencepiece

from .model_file import CONTROL, NORMAL, ModelFile, Piece
from .variants import INFILLING_PIECES

MAX_PIECE_CHARS = 16
_RUNS = tuple("▁" * n for n in range(2, MAX_PIECE_CHARS + 1))
_RUN_SCORE = -1e9  # below every other piece: the value in Llama's file
MIN_PIECES = 300  # 3 control pieces, 256 bytes, 15 runs of blanks and some letters


def train_model_file(texts: Iterable[str], n_pieces: int, n_threads: int = 2) -> ModelFile:
    """Learn `n_pieces` pieces (bytes and control pieces included); the same texts, the same result.

    The infilling pieces come on top, as the last four ids.

    Raises:
        ValueError: the texts are too few or too uniform for that many pieces.

    Source: the protobuf settings of Llama's tokenizer.model (fact sheet 2.1).
    """
    if n_pieces < MIN_PIECES:
        raise ValueError(f"vocab_size = {n_pieces} is too small; at least {MIN_PIECES}")
    lines = list(_lines(texts))
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=out,
            vocab_size=n_pieces,
            model_type="bpe",
            character_coverage=_coverage(lines, n_pieces),
            max_sentencepiece_length=MAX_PIECE_CHARS,
            max_sentence_length=4192,
            split_by_unicode_script=True,
            split_by_whitespace=True,
            split_by_number=True,
            split_digits=True,
            byte_fallback=True,
            allow_whitespace_only_pieces=True,
            treat_whitespace_as_suffix=False,
            normalization_rule_name="identity",
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            unk_surface=" \u2047 ",
            num_threads=n_threads,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"no vocabulary of {n_pieces} pieces from these texts: {reason}") from None
    file = ModelFile.parse(out.getvalue())
    return file.with_pieces([*_with_runs(file.pieces), *_infilling_pieces()])


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        # Half surrogates cannot be learned from, NUL ends a sentence early.
        for line in text.encode("utf-8", "ignore").decode().replace("\0", "\n").split("\n"):
            if line and not line.isspace():
                yield line


def _coverage(lines: list[str], n_pieces: int) -> float:
    """Llama's share of characters that get a piece, or less where they would crowd out the merges.

    On 40 MB of installed Python packages Llama's share means 2906 characters, a third of a
    vocabulary of 8192, nearly all from tables of scripts and emoji.
    """
    counts: Counter[str] = Counter()
    for line in lines:
        counts.update(line)
    limit = max(128, n_pieces // 15)  # Llama: 2129 of 32000
    kept = sum(count for _, count in counts.most_common(limit))
    return min(0.99995, kept / max(1, counts.total()))


def _infilling_pieces() -> list[Piece]:
    return [Piece(text, 0.0, CONTROL) for text in INFILLING_PIECES]


def _with_runs(pieces: tuple[Piece, ...]) -> list[Piece]:
    """Put all runs of blanks first among the learned pieces, in place of the rarest merges."""
    fixed = list(pieces[:259])
    learned = [piece for piece in pieces[259:] if set(piece.text) != {"▁"} or len(piece.text) == 1]
    merges = [piece for piece in learned if len(piece.text) > 1]
    characters = [piece for piece in learned if len(piece.text) == 1]
    room = len(pieces) - len(fixed) - len(_RUNS) - len(characters)
    if room < 0:
        raise ValueError(
            f"{len(pieces)} pieces are too few: {len(characters)} are single characters"
        )
    kept = [Piece(text, _RUN_SCORE, NORMAL) for text in _RUNS] + merges[:room] + characters
    return fixed + kept
