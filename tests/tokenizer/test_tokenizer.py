import contextlib
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from codellama.tokenizer import StreamDecoder, Tokenizer, infilling_example, infilling_prompt
from codellama.tokenizer.model_file import CONTROL, NORMAL, UNUSED, ModelFile, Piece
from codellama.tokenizer.variants import FILLERS, HELPERS, INFILLING_PIECES, STEP

AS_THEY_COME = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SPECIALS = (*INFILLING_PIECES, *HELPERS, *FILLERS, STEP, "<s>", "</s>", "<unk>", "<0x0A>", "<pad>")
FRAGMENTS = [
    *SPECIALS,
    *(text.replace("▁", " ") for text in SPECIALS),
    *(
        " ",
        "  ",
        "    ",
        "\n",
        "\r\n",
        "\t",
        "\0",
        "▁",
        "é",
        "生",
        "🙂",
        "\ufffd",
        "def f(x):",
        "9",
    ),
]
texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join),
)

# Fact sheet 2.4, from the tests of Transformers' Code Llama tokenizer.
GOLDEN = {
    "This is a test": [1, 910, 338, 263, 1243],
    "A sample test": [1, 319, 4559, 1243],
    "": [1],
    " ": [1, 259],
    "  ": [1, 1678],
    " Hello": [1, 29871, 15043],
    "Hi  Hello": [1, 6324, 29871, 15043],
    "Hi   Hello": [1, 6324, 259, 15043],
    "The following string should be properly encoded: Hello.": [
        *(1, 450, 1494, 1347, 881, 367, 6284, 18511, 29901, 15043, 29889)
    ],
    "But ird and ปี   ird   ด": [
        *(1, 1205, 29871, 1823, 322, 29871, 31010, 30691, 1678, 1823, 1678, 30718)
    ],
    "生活的真谛是": [1, 29871, 30486, 31704, 30210, 30848, 235, 179, 158, 30392],
}


@pytest.mark.parametrize("text", GOLDEN)
def test_golden_ids(llama, text):
    assert llama.encode(text, bos=True) == GOLDEN[text]
    assert llama.decode(GOLDEN[text]) == text


def test_ids_equal_those_of_sentencepiece(llama, llama_file, stdlib_sources):
    reference = sentencepiece.SentencePieceProcessor(model_file=str(llama_file))
    for text in stdlib_sources:
        ids = reference.encode(text)
        assert llama.encode(text) == ids
        assert llama.decode(ids) == reference.decode(ids) == text


@AS_THEY_COME
@given(ids=st.lists(st.integers(0, 31_999)))
def test_decoding_equals_that_of_sentencepiece(llama, llama_file, ids):
    reference = sentencepiece.SentencePieceProcessor(model_file=str(llama_file))
    assert llama.decode(ids) == reference.decode(ids)


@AS_THEY_COME
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁")))
def test_encoding_without_prefix_space_equals_the_reference_trick(llama, text):
    assert llama.encode_without_prefix_space(text) == llama.encode("☺" + text)[2:]


@AS_THEY_COME
@given(text=texts)
def test_any_text_comes_back_and_never_as_control_ids(tokenizer, text):
    forbidden = {i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == b""}
    forbidden |= {0} | {i for i, p in enumerate(tokenizer.file.pieces) if p.kind == UNUSED}
    ids = tokenizer.encode(text)
    assert not forbidden.intersection(ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text, "", text]) == [ids, [], ids]
    continued = tokenizer.encode_without_prefix_space(text)
    assert not forbidden.intersection(continued)
    assert tokenizer.decode_infilling(continued) == text
    assert b"".join(map(tokenizer.token_bytes, continued)) == text.encode()


@AS_THEY_COME
@given(data=st.binary())
def test_any_bytes_come_back(tokenizer, data):
    assert tokenizer.decode_bytes(tokenizer.encode_bytes(data)) == data


def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(ValueError, match="U\\+D83D"):
        tokenizer.encode("a\ud83db")


@AS_THEY_COME
@given(text=texts, skip=st.booleans())
def test_streaming_a_text_emits_whole_characters_only(tokenizer, text, skip):
    ids = tokenizer.encode(text)
    stream = StreamDecoder(tokenizer, skip_leading_space=skip)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) == tokenizer.decode(ids, keep_leading_space=not skip)
    assert stream.flush() == ""
    assert "".join(pieces).count("\ufffd") == text.count("\ufffd")


@AS_THEY_COME
@given(data=st.data())
def test_streaming_any_ids_equals_decoding_them(tokenizer, data):
    lows, all_ids = st.integers(0, 300), st.integers(0, tokenizer.vocab_size - 1)
    ids = data.draw(st.lists(lows | all_ids))
    stream = StreamDecoder(tokenizer)
    text = "".join([stream.push(i) for i in ids]) + stream.flush()
    assert text == tokenizer.decode(ids)
    text.encode()  # raises for a broken character


@AS_THEY_COME
@given(prompt=texts, answer=texts)
def test_streaming_after_a_prompt_is_what_the_ids_add(tokenizer, prompt, answer):
    before = tokenizer.encode(prompt, bos=True)
    after = tokenizer.encode_without_prefix_space(answer) if prompt else tokenizer.encode(answer)
    stream = StreamDecoder(tokenizer, skip_leading_space=tokenizer.starts_text(before))
    added = "".join([stream.push(i) for i in after])
    assert added == tokenizer.decode(before + after)[len(prompt) :] == answer


def test_where_generated_text_starts(small_tokenizer):
    t = small_tokenizer
    assert t.starts_text([t.bos_id])
    assert not t.starts_text(t.encode("x", bos=True))
    for suffix_first in (False, True):
        assert not t.starts_text(infilling_prompt(t, "x", "y", suffix_first))
        assert t.starts_text(infilling_prompt(t, "", "y", suffix_first))


def test_many_threads_share_one_tokenizer(tokenizer, stdlib_sources):
    expected = [tokenizer.encode(text) for text in stdlib_sources[:20]]
    with ThreadPoolExecutor(8) as pool:
        results = [pool.submit(tokenizer.encode_batch, stdlib_sources[:20]) for _ in range(4)]
        singles = list(pool.map(tokenizer.encode, stdlib_sources[:20]))
    assert singles == expected
    assert all(result.result() == expected for result in results)


def test_batches_equal_singles(tokenizer, stdlib_sources):
    batch = ["", "▁", " x", "\udcff", *stdlib_sources[:10]]
    expected = [tokenizer.encode(text, bos=True, eos=True) for text in batch]
    assert tokenizer.encode_batch(batch, bos=True, eos=True) == expected


def test_pickling_keeps_everything(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode(" def f():\n    x") == tokenizer.encode(" def f():\n    x")
    names = ("vocab_size", "prefix_id", "step_id", "chat_format", "add_dummy_prefix")
    assert [getattr(copy, n) for n in names] == [getattr(tokenizer, n) for n in names]


@pytest.mark.parametrize(
    ("name", "size", "infills", "step", "chat_format", "dummy"),
    [
        ("7b", 32_016, True, None, None, True),
        ("CodeLlama-13b-hf", 32_016, True, None, None, True),
        ("codellama/CodeLlama-34b-hf", 32_000, False, None, None, True),
        ("70B", 32_016, True, None, None, True),
        ("7b-python", 32_000, False, None, None, True),
        ("70b-python", 32_016, False, None, None, True),
        ("codellama-7b-instruct-hf", 32_016, True, None, "inst", True),
        ("34b-instruct", 32_000, False, None, "inst", True),
        ("CodeLlama-70b-Instruct-hf", 32_016, True, 32_015, "source", False),
    ],
)
def test_variants(llama_file, tmp_path, name, size, infills, step, chat_format, dummy):
    tokenizer = Tokenizer.load(llama_file, variant=name)
    tokenizer.save(tmp_path)
    for t in (tokenizer, Tokenizer.load(tmp_path), Tokenizer.load(tmp_path, variant=name)):
        assert (t.vocab_size, t.supports_infilling, t.step_id) == (size, infills, step)
        assert (t.chat_format, t.add_dummy_prefix) == (chat_format, dummy)
        expected = (32_007, 32_008, 32_009, 32_010) if infills else (None,) * 4
        assert (t.prefix_id, t.suffix_id, t.middle_id, t.eot_id) == expected
        assert (t.unk_id, t.bos_id, t.eos_id) == (0, 1, 2)


def test_a_released_file_with_ordinary_infilling_pieces(llama, llama_file, tmp_path):
    plain = ModelFile.read(llama_file)
    added = [Piece(p.text, -31_741.0 - i, NORMAL) for i, p in enumerate(llama.file.pieces[32_000:])]
    released = tmp_path / "tokenizer.model"
    released.write_bytes(plain.with_pieces([*plain.pieces, *added]).to_bytes())
    for variant in (None, "7b"):
        t = Tokenizer.load(released, variant)
        assert t.file.pieces == llama.file.pieces
        for text in (*SPECIALS, *(f"x {s[1:]} {s}" for s in SPECIALS), " <Map <E> <SUBX"):
            assert t.encode(text) == llama.encode(text)
            assert max(t.encode(text)) < 32_000
    assert llama.decode([910, 32_003]) == "This <M"
    with pytest.raises(ValueError, match="32016 pieces, but variant '34b' has 32000"):
        Tokenizer.load(released, "34b")
    with pytest.raises(ValueError, match="<step>"):
        Tokenizer.load(released, "70b-instruct")


def test_unknown_variants_and_files_are_named(tmp_path, small_tokenizer):
    small_tokenizer.save(tmp_path)
    with pytest.raises(ValueError, match=r"unknown variant '8b'; accepted: 7b, 13b"):
        Tokenizer.load(tmp_path, variant="8b")
    with pytest.raises(ValueError, match="604 pieces"):
        Tokenizer.load(tmp_path, variant="7b")
    with pytest.raises(ValueError, match=r"missing.*No such file"):
        Tokenizer.load(tmp_path / "missing")
    (tmp_path / "tokenizer_config.json").write_text("[1")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: not readable as JSON"):
        Tokenizer.load(tmp_path)


@AS_THEY_COME
@given(data=st.data())
def test_damaged_files_are_refused_or_still_work(small_tokenizer, tmp_path, data):
    content = bytearray(small_tokenizer.file.to_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    with contextlib.suppress(ValueError):
        tokenizer = Tokenizer.load(path)
        tokenizer.decode(tokenizer.encode("def f(x):\n    return x"))


def test_ids_outside_the_vocabulary_are_refused(small_tokenizer):
    for bad in (-1, small_tokenizer.vocab_size):
        for use in (
            small_tokenizer.piece,
            small_tokenizer.token_bytes,
            StreamDecoder(small_tokenizer).push,
            lambda i: small_tokenizer.decode([5, i]),
        ):
            with pytest.raises(ValueError, match=f"id {bad} is outside the vocabulary of 604"):
                use(bad)


def test_the_file_is_written_as_it_was_read(llama_file):
    assert ModelFile.read(llama_file).to_bytes() == llama_file.read_bytes()


def test_a_vocabulary_without_trainer_settings_works_the_same(small_tokenizer, stdlib_sources):
    bare = Tokenizer(ModelFile(small_tokenizer.file.pieces))
    assert bare.encode(stdlib_sources[0]) == small_tokenizer.encode(stdlib_sources[0])


def test_training_follows_llama(small_tokenizer, stdlib_sources):
    t = small_tokenizer
    assert t.vocab_size == 604
    assert (t.prefix_id, t.suffix_id, t.middle_id, t.eot_id) == (600, 601, 602, 603)
    assert [p.kind for p in t.file.pieces[600:]] == [CONTROL] * 4
    assert t.encode_without_prefix_space("\n") == [13]
    pieces = [t.piece(i) for i in t.encode("    def f():\n        def 123")]
    assert pieces[:2] == ["▁▁▁▁", "▁def"]
    assert "▁▁▁▁▁▁▁" in pieces  # seven of eight blanks; the last one belongs to the word
    assert pieces[-3:] == ["1", "2", "3"]
    assert {"▁" * n for n in range(1, 17)} <= {p.text for p in t.file.pieces}
    assert not any("\n" in p.text for p in t.file.pieces)
    again = Tokenizer.train(iter(stdlib_sources), 600)
    assert again.file == t.file


def test_rare_characters_are_left_to_the_bytes(stdlib_sources):
    table = "".join(chr(0x4E00 + n) for n in range(3000))
    t = Tokenizer.train([*stdlib_sources, *[table[n::50] for n in range(50)]], 700)
    assert sum(len(p.text) == 1 for p in t.file.pieces) <= 128
    assert t.decode(t.encode(table)) == table


def test_training_needs_enough_text():
    with pytest.raises(ValueError, match="vocabulary of 5000 pieces"):
        Tokenizer.train(["def f():\n    return 1\n"], 5000)
    with pytest.raises(ValueError, match="vocab_size = 100 is too small"):
        Tokenizer.train(["x"], 100)
    with pytest.raises(ValueError, match="no vocabulary of 600"):
        Tokenizer.train([], 600)


def test_chat_format_can_be_set(small_tokenizer, small_source):
    assert small_tokenizer.chat_format is None
    assert small_tokenizer.with_chat_format("inst").chat_format == "inst"
    with pytest.raises(ValueError, match="chat format 'source'"):
        small_tokenizer.with_chat_format("source")
    with pytest.raises(ValueError, match="chat format 'inst'"):
        small_source.with_chat_format("inst")


@AS_THEY_COME
@given(parts=st.tuples(texts, texts, texts), suffix_first=st.booleans())
def test_infilling_parts_bring_no_control_ids(tokenizer, parts, suffix_first):
    t = tokenizer
    controls = {i for i, p in enumerate(t.file.pieces) if p.kind == CONTROL}
    prompt = infilling_prompt(t, parts[0], parts[2], suffix_first)
    assert [i for i in prompt if i in controls].count(t.prefix_id) == 1
    expected = sorted([t.bos_id, t.prefix_id, t.suffix_id, t.middle_id])
    assert sorted(i for i in prompt if i in controls) == expected
    example = infilling_example(t, *parts, suffix_first=suffix_first)
    expected = sorted([t.prefix_id, t.suffix_id, t.middle_id, t.eot_id])
    assert sorted(i for i in example if i in controls) == expected
