import ast
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codellama.data import fim
from codellama.data.fim import split_at_lines, split_document, split_three, transform

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


def parts_of(tokenizer, ids):
    """(prefix and middle, suffix) of a transformed document, by its ids alone."""
    pre, suf = tokenizer.prefix_id, tokenizer.suffix_id
    mid, eot = tokenizer.middle_id, tokenizer.eot_id
    assert ids[0] == pre
    assert ids[-1] == eot
    assert sorted(Counter(i for i in ids if i in (pre, suf, mid, eot)).values()) == [1, 1, 1, 1]
    at_suf, at_mid = ids.index(suf), ids.index(mid)
    assert at_suf < at_mid
    suffix = tokenizer.decode_infilling(ids[at_suf + 1 : at_mid])
    if ids[1] == suf:  # prefix and middle are one text
        return tokenizer.decode(ids[at_mid + 1 : -1]), suffix
    prefix = tokenizer.decode(ids[1:at_suf])
    return prefix + tokenizer.decode_infilling(ids[at_mid + 1 : -1]), suffix


@given(TEXTS, st.integers())
def test_parts_join_to_the_text(text, seed):
    assert "".join(split_three(text, random.Random(seed))) == text


def test_cut_points_are_uniform_over_the_characters():
    rng = random.Random(0)
    points: Counter[int] = Counter()
    n = 20_000
    for _ in range(n):
        prefix, middle, _ = split_three("0123456789", rng)
        points.update([len(prefix), len(prefix) + len(middle)])
    assert sorted(points) == list(range(11))  # both ends too: any part may be empty
    chi_square = sum((points[i] - 2 * n / 11) ** 2 / (2 * n / 11) for i in range(11))
    assert chi_square < 29.6  # 10 degrees of freedom, one in a thousand


def test_cut_points_are_independent():
    rng = random.Random(0)
    middles = Counter(len(split_three("01", rng)[1]) for _ in range(9000))
    # Of nine equal pairs of points three coincide, four are neighbours, two are apart.
    assert middles[0] / 9000 == pytest.approx(3 / 9, abs=0.02)
    assert middles[1] / 9000 == pytest.approx(4 / 9, abs=0.02)


@given(text=TEXTS, seed=st.integers())
def test_transformed_document_is_the_document(small_tokenizer, text, seed):
    ids, weights = transform(small_tokenizer, text, random.Random(seed), 1.0, 0.5)
    assert weights is None  # all of it is learned alike
    assert ids is not None
    before, suffix = parts_of(small_tokenizer, ids)
    if before + suffix != text:  # PSM with an empty prefix looks like SPM; its first space is real
        assert ids[1] == small_tokenizer.suffix_id
        before = small_tokenizer.decode_infilling(
            ids[ids.index(small_tokenizer.middle_id) + 1 : -1]
        )
    assert before + suffix == text


@given(TEXTS, st.integers())
def test_gaps_at_lines_join_to_the_text(text, seed):
    prefix, middle, suffix = split_at_lines(text, random.Random(seed))
    assert prefix + middle + suffix == text
    assert suffix == "" or suffix[0] == "\n"


def test_gaps_at_lines():
    """Half from a line's start, half from within; 0.4 of those left go on at each line's end."""
    text = "\n".join(f"line {number:04}" for number in range(1000))
    gaps = [split_at_lines(text, random.Random(seed)) for seed in range(4000)]
    from_start = sum(not prefix or prefix.endswith("\n") for prefix, _, _ in gaps)
    assert from_start / 4000 == pytest.approx(0.5 + 0.5 / 10, abs=0.04)
    n_ends = Counter(middle.count("\n") for _, middle, _ in gaps)
    for further, share in enumerate([0.6, 0.24, 0.096]):
        assert n_ends[further] / 4000 == pytest.approx(share, abs=0.04)


@pytest.fixture
def drawn(monkeypatch):
    """What was drawn for each of many documents: None, or whether the suffix comes first."""
    monkeypatch.setattr(fim, "infilling_example", lambda *arguments: arguments[-1])

    def draw(fim_rate, spm_share, n):
        rngs = map(random.Random, range(n))
        found = [transform(None, "def f(): pass", rng, fim_rate, spm_share) for rng in rngs]
        return [each and each[0] for each in found]

    return draw


def test_rates(drawn):
    kinds = Counter(drawn(0.9, 0.5, 4000))
    # Five standard deviations.
    assert kinds[None] / 4000 == pytest.approx(0.1, abs=0.024)
    assert kinds[True] / (kinds[True] + kinds[False]) == pytest.approx(0.5, abs=0.042)


def test_rates_at_their_ends(drawn):
    assert set(drawn(0, 0.5, 50)) == {None}
    assert set(drawn(1, 0, 50)) == {False}
    assert set(drawn(1, 1, 50)) == {True}


def test_a_changed_rate_keeps_the_cut_points(small_tokenizer):
    for seed in range(50):
        some, every = (
            transform(small_tokenizer, "a = [1, 2, 3]", random.Random(seed), rate, 0.5)
            for rate in (0.5, 1.0)
        )
        assert some in (None, every)


def test_the_share_of_gaps_at_lines_does_not_move_the_other_cut_points(small_tokenizer):
    text = "a = [1, 2, 3]\nb = [4, 5]\n" * 3
    differ = 0
    for seed in range(100):
        none, half, every = (
            transform(small_tokenizer, text, random.Random(seed), 1, 0.5, share)
            for share in (0.0, 0.5, 1.0)
        )
        assert half in (none, every)
        _, suffix = parts_of(small_tokenizer, every[0])
        assert suffix == "" or suffix[0] == "\n"
        differ += half != none
    assert 25 < differ < 75


def learned_from(tokenizer, rng, spm_share):
    """The ids of a transformed document, and at which the heavier ones begin."""
    ids, weights = transform(tokenizer, "", rng, 1.0, spm_share, 0.0, middle_weight=4.0)
    begin = weights.index(4)
    assert weights == [1] * begin + [4] * (len(ids) - begin)
    return ids, begin


@pytest.mark.parametrize(
    ("prefix", "middle"), [("a =", " [1, 2"), ("sel", "f.x"), ("", "x"), ("x", "")]
)
def test_the_middle_weighs_more(small_tokenizer, monkeypatch, prefix, middle):
    """And EOT; where a token is of both prefix and middle, it is the middle's."""
    monkeypatch.setattr(fim, "split_three", lambda text, rng: (prefix, middle, "]\n"))
    tokenizer, seed = small_tokenizer, random.Random(0)
    ids, begin = learned_from(tokenizer, seed, 0.0)
    assert ids[begin - 1] == tokenizer.middle_id
    assert ids[begin:] == [*tokenizer.encode_without_prefix_space(middle), tokenizer.eot_id]
    ids, begin = learned_from(tokenizer, seed, 1.0)
    both, before = tokenizer.encode(prefix + middle), tokenizer.encode(prefix)
    n_same = next(
        (i for i, (x, y) in enumerate(zip(both, before, strict=False)) if x != y), len(before)
    )
    assert ids[begin:] == [*both[n_same:], tokenizer.eot_id]
    assert both[:n_same] == ids[ids.index(tokenizer.middle_id) + 1 : begin]


def test_same_seed_same_split(small_tokenizer):
    def draw(name):
        return transform(small_tokenizer, "a = [1, 2, 3]\n" * 9, random.Random(name), 1, 0.5)

    assert draw("0/1/abc/0") == draw("0/1/abc/0")
    assert draw("0/1/abc/0") != draw("0/2/abc/0")


# -- documents in parts -----------------------------------------------------------------------

LINES = [
    "x = 1",
    "def f(a):",
    "    return a",
    "@wrapped",
    "@other(",
    "    1,",
    ")",
    "class C:",
    "# a remark",
    "try:",
    "except E:",
    "else:",
    '"""',
    "",
    "    ",
    "elif_not = 2",
]


@given(
    st.one_of(TEXTS, st.lists(st.sampled_from(LINES), max_size=40).map("\n".join)),
    st.one_of(st.none(), st.integers(1, 80)),
)
def test_parts_of_a_document_join_to_it(text, max_chars):
    parts = split_document(text, max_chars)
    assert "".join(parts) == text
    assert all(parts) or parts == [""]
    if max_chars is not None:  # only a single line is longer
        assert all(len(part.splitlines()) <= 1 for part in parts if len(part) > max_chars)


def test_short_documents_and_no_limit():
    text = "x = 1\ny = 2\n"
    assert split_document(text, len(text)) == [text]
    assert split_document(text, None) == [text]
    assert split_document(text, len(text) - 1) == ["x = 1\n", "y = 2\n"]


def test_parts_are_filled_up():
    text = "".join(f"x{i} = {i}\n" for i in range(10))  # 7 characters each
    assert [len(part) for part in split_document(text, 21)] == [21, 21, 21, 7]


def test_text_without_any_statement_stays_whole():
    text = "    indented\n" * 20
    for whole in (text, '"""' + text):
        assert split_document(whole, 30, whole_definitions=True) == [whole]
        assert max(map(len, split_document(whole, 30))) <= 30


def test_what_belongs_together_stays_together():
    function = "@first\n@second(\n    1,\n)\n# why\ndef f():\n    return 1\n\n\n"
    statement = "try:\n    import a\nexcept E:\n    a = 0\nelse:\n    b = 1\nfinally:\n    c = 2\n"
    condition = "if a:\n    pass\nelif b:\n    pass\nelse:\n    pass\n"
    units = [function, statement, condition, "# note\n", "elsewhere = 1\n", "finally_ = 2\n"]
    parts = split_document("".join(units), 1, whole_definitions=True)
    assert parts == [*units[:3], "# note\nelsewhere = 1\n", units[5]]
    # A decorated function that would go over the limit is cut off before its decorator.
    assert split_document(condition + function, len(function)) == [condition, function]


def test_a_long_class_is_cut_at_its_methods():
    text = (
        'class C:\n    """It says:\n\n    def not_a_method(): ...\n    """\n\n'
        "    @property\n    def a(self):\n        return [\n    1]\n\n"
        "    # about b\n    async def b(self):\n        if 1:\n            pass\n\n"
        "x = 1\n"
    )
    head, a, b = split_document(text, 80)
    assert head.startswith("class C")
    assert head.endswith('"""\n\n')
    assert a.startswith("    @property")
    assert a.endswith("1]\n\n")
    assert b.startswith("    # about b")
    assert b.endswith("x = 1\n")


def as_program(part: str) -> str:
    """A part that starts with a method stands in a class."""
    return "class Whole:\n" + part if part.lstrip("\n").startswith(" ") else part


def test_parts_of_real_modules_are_programs(stdlib_sources):
    n_parts = n_programs = 0
    for text in stdlib_sources:
        for part in split_document(text, 1000, whole_definitions=True):
            n_parts += 1
            try:
                ast.parse(as_program(part))
            except SyntaxError:
                continue
            n_programs += 1
    assert n_parts > 500
    assert n_programs / n_parts > 0.9


def test_parts_of_real_modules_keep_to_the_limit(stdlib_sources):
    parts = [part for text in stdlib_sources for part in split_document(text, 2400, True)]
    assert sum(len(part) <= 2400 for part in parts) / len(parts) > 0.8
    # Longer ones are single definitions.
    assert all(split_document(part, 1, True) == [part] for part in parts if len(part) > 2400)
