"""The vocabulary of a recipe: learned from a sample of the corpus, or taken from a file.

In: a corpus folder. Out: the recipe's tokenizer folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from codellama.artifact import new_folder
from codellama.data.corpus import corpus_documents
from codellama.recipe import Recipe
from codellama.tokenizer import Tokenizer


def prepare_tokenizer(recipe: Recipe) -> Path:
    """Make the recipe's tokenizer folder where it does not exist yet, and return it.

    Raises:
        ValueError: no corpus to learn from, or too little text for that many pieces.
    """
    folder = recipe.tokenizer_dir
    if folder.is_dir():
        return folder
    settings = recipe.tokenizer
    if settings.path is not None:
        tokenizer = Tokenizer.load(settings.path)
    else:
        tokenizer = Tokenizer.train(_sample(recipe), settings.vocab_size)
    with new_folder(folder) as temporary:
        tokenizer.save(temporary)
    return folder


def _sample(recipe: Recipe) -> Iterator[str]:
    """Training documents, which stand in shuffled order, up to the wanted number of bytes."""
    n_bytes = 0
    for text in corpus_documents(recipe.corpus_dir, "train"):
        yield text
        n_bytes += len(text.encode("utf-8", "surrogatepass"))
        if n_bytes >= recipe.tokenizer.sample_bytes:
            return
