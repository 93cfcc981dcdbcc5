"""The vocabulary of a recipe: learned from a sample of the corpus, or that of its weights.

In: a corpus folder. Out: the recipe's tokenizer folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from codellama.artifact import new_folder
from codellama.data.corpus import corpus_documents
from codellama.recipe import Recipe
from codellama.tokenizer import Tokenizer
from codellama.tokenizer.variants import INFILLING_PIECES
from codellama.weights import load_tokenizer, open_weights


def prepare_tokenizer(recipe: Recipe) -> Path:
    """Make the recipe's tokenizer folder where it does not exist yet, and return it.

    Raises:
        ValueError: no corpus to learn from, too little text for that many pieces, or the folder
            holds another vocabulary.
    """
    folder = recipe.tokenizer_dir
    if folder.is_dir():
        _check_same(folder, recipe)
        return folder
    tokenizer = _given(recipe)
    if tokenizer is None:
        tokenizer = Tokenizer.train(_sample(recipe), recipe.tokenizer.vocab_size)
    with new_folder(folder) as temporary:
        tokenizer.save(temporary)
    return folder


def _given(recipe: Recipe) -> Tokenizer | None:
    """The vocabulary that is not learned: from `tokenizer.path`, or of the weights that all stages
    come from."""
    if recipe.tokenizer.path is not None:
        return Tokenizer.load(recipe.tokenizer.path)
    roots = {stage.init for stage in recipe.stages.values() if stage.init not in recipe.stages}
    if "random" in roots:
        return None
    if len(roots) > 1:
        raise ValueError(
            f"the stages start from {', '.join(sorted(roots))}: say with tokenizer.path whose "
            "vocabulary they share"
        )
    return load_tokenizer(open_weights(roots.pop()))


def _check_same(folder: Path, recipe: Recipe) -> None:
    """Refuse a vocabulary that the recipe does not ask for; models may depend on it."""
    found = Tokenizer.load(folder)
    given = _given(recipe)
    if given is not None:
        same = given.file.pieces == found.file.pieces
    else:
        same = found.vocab_size == recipe.tokenizer.vocab_size + len(INFILLING_PIECES)
    if not same:
        raise ValueError(
            f"{folder} holds another vocabulary ({found.vocab_size} ids) than the recipe asks for; "
            "delete it, or set another `work`"
        )


def _sample(recipe: Recipe) -> Iterator[str]:
    """Training documents, which stand in shuffled order, up to the wanted number of bytes."""
    n_bytes = 0
    for text in corpus_documents(recipe.corpus_dir, "train"):
        yield text
        n_bytes += len(text.encode("utf-8", "surrogatepass"))
        if n_bytes >= recipe.tokenizer.sample_bytes:
            return
