"""Small corpora in memory, and a loader over them that worker processes can open too."""

import random
from functools import partial

from codellama.data.packing import PackingSettings, Share

WORDS = ("def", "return", "for", "in", "x", "value", "self", "None", "0", "123", "(", "é", ":", "=")


class TextList:
    """Documents from a list, so that a worker can be given them."""

    def __init__(self, texts):
        self.texts = texts

    def __len__(self):
        return len(self.texts)

    def text(self, index):
        return self.texts[index]

    def sha256(self, index):
        return f"{index:064x}"


class Failing(TextList):
    """Raises at one document."""

    def __init__(self, texts, at, error):
        super().__init__(texts)
        self.at, self.error = at, error

    def text(self, index):
        if index == self.at:
            raise self.error
        return self.texts[index]


def make_texts(n, seed=0, longest=60):
    """Documents from empty to several contexts long."""
    rng = random.Random(seed)
    return [
        " ".join(rng.choice(WORDS) for _ in range(rng.randint(0, longest))) + "\n" * (i % 2)
        for i in range(n)
    ]


def same(value):
    return value


def make_loader(documents, tokenizer, n_lanes=4, **options):
    """A loader of 32-token sequences, transformed for infilling unless told otherwise."""
    from codellama.data.loader import Loader  # not above: workers import this file

    names = ("rank", "world_size", "n_workers")
    place = {"n_workers": 0} | {name: options.pop(name) for name in names if name in options}
    settings = PackingSettings(**({"seq_len": 32, "fim_rate": 0.9} | options))
    return Loader(
        partial(same, [Share("texts", documents)]),
        partial(same, tokenizer),
        settings,
        n_lanes=n_lanes,
        **place,
    )
