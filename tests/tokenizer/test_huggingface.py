import json
import random
import sysconfig
from pathlib import Path

import pytest

from codellama.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

SNIPPETS = [
    *(
        " ",
        "  ",
        "    ",
        " " * 17,
        "\n",
        "\r\n",
        "\t",
        "\0",
        "é",
        "生",
        "谛",
        "🙂",
        "\ufffd",
        "e\u0301",
    ),
    *(
        "\u200b",
        "\u3000",
        "ab" * 5,
        "aaaa",
        "----",
        "____",
        "def",
        " return",
        "=",
        "1",
        "23",
        "</",
        "<",
    ),
]


@pytest.fixture(scope="module")
def samples():
    folder = Path(sysconfig.get_path("stdlib"))
    files = [path for path in sorted(folder.rglob("*.py")) if path.stat().st_size < 20_000][:300]
    texts = [path.read_bytes().decode("utf-8", "ignore").replace("▁", "") for path in files]
    draw = random.Random(0)
    made = ["".join(draw.choices(SNIPPETS, k=draw.randint(0, 20))) for _ in range(500)]
    return [*texts, *made, "", " ", "  x", "\n", "\nx", " <PRE>", "x <SUF> <MID", "<0x0A>"]


@pytest.fixture
def pair(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return tokenizer, transformers.AutoTokenizer.from_pretrained(tmp_path)


def test_ids_and_texts_equal_those_of_transformers(pair, samples):
    ours, theirs = pair
    assert len(theirs) == ours.vocab_size
    expected = ours.encode_batch(samples, bos=True)
    assert theirs(samples)["input_ids"] == expected
    assert theirs(samples[:5], add_special_tokens=False)["input_ids"] == [
        i[1:] for i in expected[:5]
    ]
    assert theirs.batch_decode(expected, skip_special_tokens=True) == samples
    assert ours.decode(expected[0]) == samples[0]


def test_special_tokens_have_their_ids(pair):
    ours, theirs = pair
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (1, 2, 0)
    assert theirs.convert_tokens_to_ids("▁<EOT>") == ours.eot_id


DIALOGS = [
    [{"role": "user", "content": " Hi \n"}],
    [
        {"role": "system", "content": " Be kind\n"},
        {"role": "user", "content": "a\n\n b"},
        {"role": "assistant", "content": "  c "},
        {"role": "user", "content": "  "},
    ],
    [
        {"role": "user", "content": "生 谛"},
        {"role": "assistant", "content": "x", "destination": "user"},
        {"role": "user", "content": "y"},
    ],
]


@pytest.mark.parametrize("variant", ["7b-instruct", "34b-instruct", "70b-instruct"])
def test_chat_templates_give_the_reference_ids(llama_file, shared_data, tmp_path, variant):
    ours = Tokenizer.load(llama_file, variant=variant)
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    card = json.loads((shared_data / "llama-tokenizer" / "model-card-70b-dialog.json").read_text())
    for messages in (card["chat"], *DIALOGS):
        ids = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert ids == ours.encode_dialog(messages)
    if variant == "70b-instruct":
        ids = theirs.apply_chat_template(card["chat"], tokenize=True, return_dict=False)
        assert ids == card["ids"]
    with pytest.raises(Exception, match="user and assistant alternate"):
        theirs.apply_chat_template(DIALOGS[0] * 2)


def test_what_transformers_saved_is_read_without_a_tokenizer_model(pair, samples, tmp_path):
    ours, theirs = pair
    theirs.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "tokenizer.model").exists()
    again = Tokenizer.load(tmp_path / "saved")
    assert [(p.text, p.kind) for p in again.file.pieces] == [
        (p.text, p.kind) for p in ours.file.pieces
    ]
    assert again.encode_batch(samples) == ours.encode_batch(samples)
    names = ("add_dummy_prefix", "eot_id", "step_id", "chat_format", "supports_infilling")
    assert [getattr(again, name) for name in names] == [getattr(ours, name) for name in names]


def test_other_kinds_of_tokenizer_are_refused(small_tokenizer, tmp_path):
    small_tokenizer.save(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    path = tmp_path / "tokenizer.json"
    value = json.loads(path.read_text())
    for change in ({"model": {"vocab": {}, "merges": []}}, {"added_tokens": 3}, {"model": None}):
        path.write_text(json.dumps({**value, **change}))
        with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer of the Llama kind"):
            Tokenizer.load(tmp_path)
    path.write_text("[")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not readable as JSON"):
        Tokenizer.load(tmp_path)


def test_the_chat_template_may_have_its_own_file(small_tokenizer, tmp_path):
    small_tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ '[INST] ' }}")
    assert Tokenizer.load(tmp_path).chat_format == "inst"


def test_only_chat_models_have_a_template(small_tokenizer, tmp_path):
    small_tokenizer.save(tmp_path / "base")
    assert "chat_template" not in json.loads(
        (tmp_path / "base" / "tokenizer_config.json").read_text()
    )
    small_tokenizer.with_chat_format("inst").save(tmp_path / "chat")
    assert Tokenizer.load(tmp_path / "chat").chat_format == "inst"
    assert Tokenizer.load(tmp_path / "base").chat_format is None


def test_saving_leaves_four_files_and_can_be_repeated(small_tokenizer, tmp_path):
    for _ in range(2):
        small_tokenizer.save(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    assert Tokenizer.load(tmp_path / "tokenizer.model").file == small_tokenizer.file
