"""The vocabulary of a recipe: learned from a sample of the corpus, or taken from a file.

In: a corpus folder. Out: the recipe's tokenizer folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from codellama.artifact import new_folder
from codellama.data.corpus import corpus_documents
from codellama.recipe import Recipe, TokenizerSettings
from codellama.tokenizer import Tokenizer
from codellama.tokenizer.variants import INFILLING_PIECES


def prepare_tokenizer(recipe: Recipe) -> Path:
    """Make the recipe's tokenizer folder where it does not exist yet, and return it.

    Raises:
        ValueError: no corpus to learn from, too little text for that many pieces, or the folder
            holds another vocabulary.
    """
    folder = recipe.tokenizer_dir
    settings = recipe.tokenizer
    if folder.is_dir():
        _check_same(folder, settings)
        return folder
    if settings.path is not None:
        tokenizer = Tokenizer.load(settings.path)
    else:
        tokenizer = Tokenizer.train(_sample(recipe), settings.vocab_size)
    with new_folder(folder) as temporary:
        tokenizer.save(temporary)
    return folder


def _check_same(folder: Path, settings: TokenizerSettings) -> None:
    """Refuse a vocabulary that the recipe does not ask for; models may depend on it."""
    found = Tokenizer.load(folder)
    if settings.path is not None:
        same = Tokenizer.load(settings.path).file.pieces == found.file.pieces
    else:
        same = found.vocab_size == settings.vocab_size + len(INFILLING_PIECES)
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
