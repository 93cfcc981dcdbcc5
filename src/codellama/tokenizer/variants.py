"""Which special ids each released model has, and how they are kept out of the reach of text.

The real Code Llama vocabulary has its 16 added pieces as ordinary pieces, so that a text with
" <PRE>" in it turns into the control id. Here they are control pieces: only ids put them into a
prompt. Their scores were never published in the files we could check, so text never uses the seven
helper pieces either, and one text has the same ids whichever file the vocabulary came from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .model_file import CONTROL, UNUSED, ModelFile, Piece

PREFIX, SUFFIX, MIDDLE, EOT = INFILLING_PIECES = ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>")
STEP = "<step>"
HELPERS = ("▁<SU", "▁<SUF", "▁<PRE", "▁<M", "▁<MID", "▁<E", "▁<EOT")  # ids 32000 to 32006
FILLERS = tuple("▁" + "<EOT>" * n for n in range(2, 7))  # ids 32011 to 32015
_LAST = -1e30  # merged after everything else, then taken apart again because the type is UNUSED
_LLAMA_VOCAB = 32_000


@dataclass(frozen=True)
class Variant:
    """What a released model expects of its tokenizer."""

    name: str
    vocab_size: int
    infilling: bool
    chat_format: str | None

    @classmethod
    def named(cls, name: str) -> Variant:
        """Find a variant by a name such as "7b" or "codellama/CodeLlama-7b-Instruct-hf".

        Raises:
            ValueError: unknown; the message lists the accepted names.
        """
        short = name.lower().strip().rsplit("/", 1)[-1]
        short = short.removeprefix("codellama-").removesuffix("-hf").removesuffix("-base")
        if short not in VARIANTS:
            raise ValueError(f"unknown variant {name!r}; accepted: {', '.join(VARIANTS)}")
        return VARIANTS[short]


# Fact sheet table 1.3. 70B Python has the larger vocabulary but was never said to infill.
VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("7b", 32_016, True, None),
        Variant("13b", 32_016, True, None),
        Variant("34b", 32_000, False, None),
        Variant("70b", 32_016, True, None),
        Variant("7b-python", 32_000, False, None),
        Variant("13b-python", 32_000, False, None),
        Variant("34b-python", 32_000, False, None),
        Variant("70b-python", 32_016, False, None),
        Variant("7b-instruct", 32_016, True, "inst"),
        Variant("13b-instruct", 32_016, True, "inst"),
        Variant("34b-instruct", 32_000, False, "inst"),
        Variant("70b-instruct", 32_016, True, "source"),
    )
}
CAN_INFILL = tuple(name for name, variant in VARIANTS.items() if variant.infilling)


def apply_variant(file: ModelFile, variant: Variant) -> ModelFile:
    """Return the vocabulary of a variant, given its own file or the plain Llama 2 one.

    Raises:
        ValueError: the file is neither of the two.
    """
    size = len(file.pieces)
    source = variant.chat_format == "source"
    if size == _LLAMA_VOCAB and variant.vocab_size > size:
        fillers = (*FILLERS[:-1], STEP) if source else FILLERS
        added = [Piece(text) for text in (*HELPERS, *INFILLING_PIECES, *fillers)]
        file = file.with_pieces((*file.pieces, *added))
    elif size != variant.vocab_size:
        expected = f"{variant.vocab_size} pieces"
        raise ValueError(f"{size} pieces, but variant {variant.name!r} has {expected}")
    if source != any(piece.text == STEP for piece in file.pieces):
        raise ValueError(f"variant {variant.name!r} does not agree with the file about {STEP}")
    # The reference prompts of 70B Instruct only come out without the dummy prefix (sheet 3.2).
    return replace(file, add_dummy_prefix=False) if source else file


def protect(file: ModelFile) -> ModelFile:
    """Mark the added pieces so that no text is ever encoded to them; helpers still decode."""
    names = {piece.text for piece in file.pieces}
    kinds: dict[str, Piece] = {}
    if STEP in names:
        kinds[STEP] = Piece(STEP, 0.0, CONTROL)
    if names.issuperset(INFILLING_PIECES):
        kinds |= {text: Piece(text, 0.0, CONTROL) for text in (*INFILLING_PIECES, *FILLERS)}
        kinds |= {text: Piece(text, _LAST, UNUSED) for text in HELPERS}
    if not kinds:
        return file
    return file.with_pieces([kinds.get(piece.text, piece) for piece in file.pieces])
