"""Collections and their shares, down to the tokens that a lane hands out."""

import json
import random
from collections import Counter

import pyarrow as pa
import pytest
from loader_inputs import TextList, make_texts

from codellama.artifact import new_folder, write_manifest
from codellama.data.corpus import KIND, SCHEMA, ShardWriter, corpus_documents
from codellama.data.mixture import Dialogs, by_kinds, chosen, mixture_report, open_mixture
from codellama.data.packing import Lane, LaneState, PackingSettings, Share
from codellama.recipe import Collection
from codellama.tokenizer import Tokenizer

SETTINGS = PackingSettings(seq_len=64)


@pytest.fixture(scope="module")
def chat_tokenizer(small_tokenizer):
    return Tokenizer(small_tokenizer.file, "inst", infilling=True)


def write_corpus(folder, rows):
    """rows: (text, source, language, and if it matters kind)."""
    with new_folder(folder) as target:
        writer = ShardWriter(target, "train")
        for row in rows:
            values = dict(zip(("text", "source", "language", "kind"), row, strict=False))
            values |= {"n_bytes": 2, "sha256": row[0], "split": "train"}
            rows = [dict.fromkeys(SCHEMA.names, "x") | values]
            writer.add(pa.Table.from_pylist(rows, schema=SCHEMA))
        writer.close()
        write_manifest(target, KIND, shards=writer.shards, fingerprint="")


def collections(*weights):
    """Texts of one letter each, so that tokens tell where they are from."""
    rng = random.Random(0)
    return [
        Share(letter, TextList([f"{letter}{i} " * rng.randint(1, 40) for i in range(30)]), weight)
        for letter, weight in zip("xyz", weights, strict=False)
    ]


@pytest.mark.parametrize("weights", [(85, 8, 7), (1, 1), (0.75, 0.25)])
@pytest.mark.parametrize("n_lanes", [1, 4])
def test_shares_of_the_tokens(small_tokenizer, weights, n_lanes):
    shares = collections(*weights)
    states = []
    for number in range(n_lanes):
        lane = Lane(shares, small_tokenizer, SETTINGS, number, n_lanes)
        for _ in range(400):
            lane.next_sequence()
        states.append(lane.state)
    report = mixture_report(shares, states)
    for row, weight in zip(report, weights, strict=True):
        assert row["share"] == pytest.approx(weight / sum(weights), abs=0.02)
        n_documents = sum(state.turns["xyz".index(row["collection"])] for state in states)
        assert row["epochs"] == pytest.approx(n_documents / 30, abs=1e-3)
    # The report agrees with what was handed out.
    n_tokens = sum(row["tokens"] for row in report) + sum(state.offset for state in states)
    assert n_tokens == 400 * n_lanes * 64


def test_every_document_once_an_epoch(small_tokenizer):
    shares = collections(3, 1)
    seen: Counter[str] = Counter()
    lanes = [Lane(shares, small_tokenizer, SETTINGS, number, 3) for number in range(3)]
    while min(lane.state.turns[1] for lane in lanes) < 10:
        for lane in lanes:
            if lane.state.turns[1] < 10:
                lane.next_sequence()
    for lane in lanes:
        # The documents of the second collection that the lane has finished, in its own order.
        replay = Lane(shares, small_tokenizer, SETTINGS, lane.lane, 3)
        for turn in range(10):
            replay.state = LaneState((0, turn), (10**9, 0))
            seen[replay._document()[1]] += 1
    assert sorted(seen.values()) == [1] * 30


def test_resumed_mixture_continues(small_tokenizer):
    shares = collections(5, 2, 1)
    for n_before in (0, 1, 7, 50):
        lane = Lane(shares, small_tokenizer, SETTINGS, 1, 2)
        for _ in range(n_before):
            lane.next_sequence()
        turns, tokens, offset = json.loads(json.dumps(lane.state))
        resumed = Lane(
            shares, small_tokenizer, SETTINGS, 1, 2, LaneState(tuple(turns), tuple(tokens), offset)
        )
        for _ in range(20):
            one, other = lane.next_sequence(), resumed.next_sequence()
            assert (one.tokens == other.tokens).all()
            assert (one.loss_mask == other.loss_mask).all()
            assert lane.names == resumed.names


def test_answers_are_learned_and_questions_are_not(chat_tokenizer, tmp_path):
    path = tmp_path / "dialogs.jsonl"
    dialogs = [
        [
            {"role": "user", "content": f"question {i}"},
            {"role": "assistant", "content": f"answer {i}"},
        ]
        for i in range(20)
    ]
    path.write_text("".join(json.dumps({"messages": d}) + "\n" for d in dialogs))
    share = Share("chat", Dialogs(path), 1.0, True)
    settings = PackingSettings(seq_len=200, fim_rate=0.9)
    lane = Lane([share], chat_tokenizer, settings, 0, 1)
    learned = ""
    for _ in range(10):
        row = lane.next_sequence()
        learned += chat_tokenizer.decode([int(t) for t in row.targets[row.loss_mask]])
        assert chat_tokenizer.prefix_id not in row.tokens
    assert "answer" in learned
    assert "question" not in learned
    ends = row.targets[row.loss_mask]
    assert chat_tokenizer.eos_id in ends, "the end of an answer is learned"
    settings = PackingSettings(seq_len=200, prompt_weight=0.5)
    both = Lane([share], chat_tokenizer, settings, 0, 1).next_sequence()
    first = both.document_ids == 0
    assert set(both.loss_weights[first][:-1].tolist()) == {0.5, 1.0}
    assert "question" in chat_tokenizer.decode(both.targets[both.loss_weights == 0.5].tolist())


def test_a_masked_dialog_may_be_cut(chat_tokenizer, tmp_path):
    path = tmp_path / "dialogs.jsonl"
    text = " ".join(make_texts(30))
    dialog = [{"role": "user", "content": text}, {"role": "assistant", "content": "yes " * 50}]
    path.write_text(json.dumps({"messages": dialog}))
    share = Share("chat", Dialogs(path), 1.0, True)
    long = Lane([share], chat_tokenizer, PackingSettings(seq_len=4096), 0, 1).next_sequence()
    lane = Lane([share], chat_tokenizer, PackingSettings(seq_len=32), 0, 1)
    rows = []
    while not lane.state.turns[0]:
        rows.append(lane.next_sequence())
    n_tokens = lane.state.tokens[0]
    tokens = [int(t) for row in rows for t in row.tokens][:n_tokens]
    assert tokens == long.tokens[:n_tokens].tolist()
    mask = [bool(m) for row in rows for m in row.loss_mask][: n_tokens - 1]
    assert mask == long.loss_mask[: n_tokens - 1].tolist()


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"messages": []}', '{"messages": [{"role": "user", "content": "x"}]}', '"x"'],
)
def test_lines_that_are_no_dialogs(tmp_path, line):
    path = tmp_path / "d.jsonl"
    good = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    path.write_text(json.dumps({"messages": good}) + "\n\n" + line + "\n")
    with pytest.raises(ValueError, match=r"d\.jsonl, line 3: expected") as error:
        Dialogs(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, {"a1", "a2", "b1"}),
        ({"sources": ("a",)}, {"a1", "a2"}),
        ({"sources": ("a", "b"), "languages": ("c",)}, {"a2"}),
        ({"languages": ("java",)}, set()),
    ],
)
def test_collections_of_a_corpus(tmp_path, settings, wanted):
    rows = (("a1", "a", "python"), ("a2", "a", "c"), ("b1", "b", "python"))
    write_corpus(tmp_path / "corpus", rows)
    collection = Collection(**settings)
    selected = chosen(corpus_documents(tmp_path / "corpus", "train"), collection)
    assert {selected.text(i) for i in range(len(selected))} == wanted
    assert {selected.sha256(i) for i in range(len(selected))} == wanted
    shares = open_mixture(tmp_path / "corpus", {"mine": collection}, {"mine": 3.0})
    assert [(share.name, share.weight) for share in shares] == [("collection 'mine'", 3.0)]
    with pytest.raises(ValueError, match="no collection 'other'; the recipe has mine"):
        open_mixture(tmp_path / "corpus", {"mine": collection}, {"other": 1.0})


def test_kinds_of_a_corpus(tmp_path):
    rows = [
        ("p", "s", "python", "code"),
        ("c", "s", "c", "code"),
        ("r", "s", "python", "code-text"),
    ]
    write_corpus(tmp_path / "corpus", [*rows, ("t", "s", "text", "text")])
    found = by_kinds(corpus_documents(tmp_path / "corpus", "train"))
    texts = {name: {part.text(i) for i in range(len(part))} for name, part in found.items()}
    assert texts == {"python": {"p"}, "other_code": {"c"}, "text": {"r", "t"}}


def test_missing_files_and_collections(tmp_path, small_tokenizer):
    with pytest.raises(ValueError, match="dialogs cannot be read"):
        Dialogs(tmp_path / "none.jsonl")
    empty = Share("collection 'x'", TextList([]))
    with pytest.raises(ValueError, match="collection 'x' has no documents"):
        Lane([empty], small_tokenizer, SETTINGS, 0, 1)
