import numpy as np

from codellama.data.dedup import KEY_BYTES, first_copies, normalised_key

TEXT = "def f(x):\n    return x\n\n\nprint(f(1))\n"


def test_layout_that_nobody_sees_makes_no_difference() -> None:
    for same in (
        TEXT.replace("\n", "\r\n"),
        TEXT.replace("\n\n\n", "\n"),
        TEXT.replace("):", "):   "),
        TEXT.rstrip(),
        "\n\n" + TEXT,
    ):
        assert normalised_key(same) == normalised_key(TEXT)


def test_everything_else_does() -> None:
    for other in (TEXT.replace("    ", "  "), TEXT.upper(), TEXT.replace("1", "2"), ""):
        assert normalised_key(other) != normalised_key(TEXT)


def test_only_the_first_of_equal_keys_stays() -> None:
    rng = np.random.default_rng(0)
    names = rng.integers(0, 300, 1000)
    keys = np.array([bytes([n % 256, n // 256]) + bytes(KEY_BYTES - 2) for n in names.tolist()])
    places = first_copies(keys.astype("V16")).tolist()
    assert places == [names.tolist().index(name) for name in names]
