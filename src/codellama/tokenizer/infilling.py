"""Infilling as sequences of ids: PSM and SPM, for training and for inference.

Marker text never takes part: the four control ids are put between encoded texts, so nothing that a
user writes can act as a marker. BOS and EOS around training documents are the loader's. With E the
ordinary encoding, E0 the one without the leading space (fact sheet 2.3 and 2.4):

    prompt   PSM  BOS PRE E(prefix) SUF E0(suffix) MID
             SPM  BOS PRE SUF E0(suffix) MID E(prefix)
    example  PSM  PRE E(prefix) SUF E0(suffix) MID E0(middle) EOT
             SPM  PRE SUF E0(suffix) MID E(prefix + middle) EOT
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .variants import CAN_INFILL

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

FILL_TOKEN = "<FILL_ME>"


def infilling_prompt(
    tokenizer: Tokenizer, prefix: str, suffix: str, suffix_first: bool = False
) -> list[int]:
    """Return the ids after which a model writes the text between prefix and suffix, then EOT.

    Raises:
        ValueError: the tokenizer has no infilling ids.

    Source: Code Llama paper 2.3; Bavarian et al. 2022, appendix D, for suffix first.
    """
    pre, suf, mid, _ = infilling_ids(tokenizer)
    before = tokenizer.encode(prefix)
    after = tokenizer.encode_without_prefix_space(suffix)
    if suffix_first:
        return [tokenizer.bos_id, pre, suf, *after, mid, *before]
    return [tokenizer.bos_id, pre, *before, suf, *after, mid]


def infilling_example(
    tokenizer: Tokenizer, prefix: str, middle: str, suffix: str, suffix_first: bool = False
) -> list[int]:
    """Return the ids of one training document, cut in three; without BOS and EOS.

    Suffix first, prefix and middle are encoded together, so that no token boundary is forced
    between them.

    Raises:
        ValueError: the tokenizer has no infilling ids.

    Source: Code Llama paper 2.3.
    """
    pre, suf, mid, eot = infilling_ids(tokenizer)
    after = tokenizer.encode_without_prefix_space(suffix)
    if suffix_first:
        return [pre, suf, *after, mid, *tokenizer.encode(prefix + middle), eot]
    before = tokenizer.encode(prefix)
    between = tokenizer.encode_without_prefix_space(middle)
    return [pre, *before, suf, *after, mid, *between, eot]


def split_fill(text: str) -> tuple[str, str]:
    """Return what is before and after the one `<FILL_ME>` of a text.

    Raises:
        ValueError: it is missing, or there is more than one.
    """
    parts = text.split(FILL_TOKEN)
    if len(parts) != 2:
        found = "not found" if len(parts) == 1 else f"found {len(parts) - 1} times"
        raise ValueError(f"{FILL_TOKEN} {found}; it must occur exactly once")
    return parts[0], parts[1]


def stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids that end an infill: EOT, and EOS, which the reference does not stop at."""
    return (tokenizer.eos_id, infilling_ids(tokenizer)[3])


def infilling_ids(tokenizer: Tokenizer) -> tuple[int, int, int, int]:
    """Return the ids of PRE, SUF, MID, EOT.

    Raises:
        ValueError: the tokenizer lacks them; names the models that can infill.
    """
    pre, suf = tokenizer.prefix_id, tokenizer.suffix_id
    mid, eot = tokenizer.middle_id, tokenizer.eot_id
    if pre is None or suf is None or mid is None or eot is None:
        raise ValueError(
            "this model cannot infill: its tokenizer has no infilling ids. "
            f"Code Llama {', '.join(CAN_INFILL)} can, and the models trained here"
        )
    return pre, suf, mid, eot
