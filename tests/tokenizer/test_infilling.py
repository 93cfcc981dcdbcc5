import pytest

from codellama.tokenizer import Tokenizer, infilling_example, infilling_prompt, split_fill
from codellama.tokenizer.infilling import stop_ids
from codellama.tokenizer.model_file import ModelFile

PREFIX = 'def remove_non_ascii(s: str) -> str:\n    """ '
SUFFIX = "\n    return result\n"
# Reference output quoted in ggml-org/llama.cpp issue 3503 (fact sheet 2.4).
BEFORE = [
    *(822, 3349, 29918, 5464, 29918, 294, 18869, 29898, 29879, 29901, 851, 29897, 1599, 851),
    *(29901, 13, 1678, 9995, 29871),
]
AFTER = [13, 1678, 736, 1121, 13]
PRE, SUF, MID, EOT = 32_007, 32_008, 32_009, 32_010


def test_golden_prompts(llama):
    psm = [1, PRE, *BEFORE, SUF, *AFTER, MID]
    spm = [1, PRE, SUF, *AFTER, MID, *BEFORE]
    assert llama.encode_infilling(PREFIX, SUFFIX) == psm
    assert llama.encode_infilling(PREFIX, SUFFIX, suffix_first=True) == spm


def test_golden_examples(llama):
    middle = "Remove characters"
    psm = infilling_example(llama, PREFIX, middle, SUFFIX, suffix_first=False)
    assert psm == [PRE, *BEFORE, SUF, *AFTER, MID, *llama.encode("☺" + middle)[2:], EOT]
    spm = infilling_example(llama, PREFIX, middle, SUFFIX, suffix_first=True)
    assert spm == [PRE, SUF, *AFTER, MID, *llama.encode(PREFIX + middle), EOT]
    # Together, " Remove" is one piece and the blank before it none.
    assert spm[-4:-1] == llama.encode('""" Remove characters')[-3:]


def test_prompts_are_the_beginnings_of_examples(llama):
    for prefix, suffix in [(PREFIX, SUFFIX), ("", SUFFIX), (PREFIX, ""), ("", "")]:
        prompt = infilling_prompt(llama, prefix, suffix)
        example = infilling_example(llama, prefix, "middle", suffix)
        assert example[: len(prompt) - 1] == prompt[1:]


@pytest.mark.parametrize(
    ("prefix", "suffix", "psm"),
    [
        ("", "", [1, PRE, SUF, MID]),
        ("x", "", [1, PRE, 921, SUF, MID]),
        ("", "x", [1, PRE, SUF, 29916, MID]),
        ("  x", " x", [1, PRE, 259, 921, SUF, 921, MID]),
        ("a\r\n", "\r\nb", [1, PRE, 263, 30004, 13, SUF, 30004, 13, 29890, MID]),
        (" ", " ", [1, PRE, 259, SUF, 29871, MID]),
    ],
)
def test_edges(llama, prefix, suffix, psm):
    assert infilling_prompt(llama, prefix, suffix) == psm
    spm = infilling_prompt(llama, prefix, suffix, suffix_first=True)
    before, after = psm[2 : psm.index(SUF)], psm[psm.index(SUF) + 1 : -1]
    assert spm == [1, PRE, SUF, *after, MID, *before]


def test_decoded_examples_join_to_the_document(small_tokenizer, stdlib_sources):
    t = small_tokenizer
    document = stdlib_sources[0][:2000]
    for a, b in [(0, 0), (0, 7), (13, 13), (500, 900), (1999, 2000), (2000, 2000)]:
        prefix, middle, suffix = document[:a], document[a:b], document[b:]
        ids = infilling_example(t, prefix, middle, suffix, suffix_first=False)
        suf, mid = ids.index(t.suffix_id), ids.index(t.middle_id)
        parts = t.decode(ids[:suf]), t.decode_infilling(ids[mid:]), t.decode_infilling(ids[suf:mid])
        assert parts == (prefix, middle, suffix)
        ids = infilling_example(t, prefix, middle, suffix, suffix_first=True)
        mid = ids.index(t.middle_id)
        assert (t.decode(ids[mid:]), t.decode_infilling(ids[:mid])) == (prefix + middle, suffix)


def test_models_without_infilling_say_so(small_tokenizer):
    plain = Tokenizer(ModelFile(small_tokenizer.file.pieces[:600]))
    for call in (
        lambda: plain.encode_infilling("a", "b"),
        lambda: infilling_example(plain, "a", "b", "c"),
        lambda: stop_ids(plain),
    ):
        with pytest.raises(ValueError, match=r"cannot infill.*7b, 13b, 70b, 7b-instruct"):
            call()


def test_stop_ids(llama):
    assert stop_ids(llama) == (2, EOT)


def test_the_fill_mark_splits_a_text():
    assert split_fill("a <FILL_ME>\nb") == ("a ", "\nb")
    assert split_fill("<FILL_ME>") == ("", "")
    with pytest.raises(ValueError, match="<FILL_ME> not found"):
        split_fill("a")
    with pytest.raises(ValueError, match="<FILL_ME> found 2 times"):
        split_fill("a<FILL_ME>b<FILL_ME>")
