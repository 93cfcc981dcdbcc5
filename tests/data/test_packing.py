import random
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loader_inputs import TextList, make_texts
from test_fim import parts_of

from codellama.data.fim import split_document
from codellama.data.packing import (
    Lane,
    LaneState,
    PackingSettings,
    Share,
    lanes_of_rank,
    part_limit,
)

TEXTS = make_texts(60)


def make_lane(tokenizer, texts=TEXTS, lane=0, n_lanes=1, state=None, **options):
    chosen = PackingSettings(**({"seq_len": 32, "fim_rate": 0.0} | options))
    return Lane([Share("texts", TextList(texts))], tokenizer, chosen, lane, n_lanes, state)


def documents_of(rows, tokenizer):
    """The documents that rows hold, as ids, BOS and EOS included; the last may be cut short."""
    stream = [int(token) for row in rows for token in row.tokens]
    starts = [i for i, token in enumerate(stream) if token == tokenizer.bos_id]
    assert starts[0] == 0
    return [stream[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)]


def take(lane, n_turns):
    """Rows until so many documents are handed out, and those documents."""
    rows = []
    while sum(lane.state.turns) < n_turns:
        rows.append(lane.next_sequence())
    return rows, documents_of(rows, lane.tokenizer)[:n_turns]


@pytest.mark.parametrize("fim_rate", [0.0, 0.9])
@pytest.mark.parametrize("max_document_chars", [None, 40])
def test_rows_are_consistent(small_tokenizer, fim_rate, max_document_chars):
    bos, eos = small_tokenizer.bos_id, small_tokenizer.eos_id
    lane = make_lane(small_tokenizer, fim_rate=fim_rate, max_document_chars=max_document_chars)
    rows = list(islice(iter(lane.next_sequence, None), 200))
    stream = np.concatenate([row.tokens for row in rows])
    targets = np.concatenate([row.targets for row in rows])
    mask = np.concatenate([row.loss_mask for row in rows])
    # Targets are the tokens that follow, also across the end of a row.
    assert (targets[:-1][mask[:-1]] == stream[1:][mask[:-1]]).all()
    assert (targets[~mask] == 0).all()
    # The loss leaves out exactly the ends of documents.
    assert (mask == (stream != eos)).all()
    assert (stream[1:][~mask[:-1]] == bos).all()
    for row in rows:
        assert all(len(field) == 32 for field in row)
        starts = np.flatnonzero(row.tokens == bos)
        begins = sorted({0, *starts.tolist()})
        for number, (a, b) in enumerate(zip(begins, [*begins[1:], 32], strict=True)):
            assert (row.document_ids[a:b] == number).all()
            assert (row.positions[a:b] == np.arange(b - a)).all()


@given(st.integers(1, 7), st.integers(2, 50), st.booleans(), st.integers(0, 3))
@settings(max_examples=20, deadline=None)
def test_every_document_once_an_epoch_and_in_order(
    small_tokenizer, n_lanes, seq_len, shuffle, seed
):
    texts = make_texts(23, seed)
    expected = [small_tokenizer.encode(text, bos=True, eos=True) for text in texts]
    n_turns = -(-2 * len(texts) // n_lanes)
    found = {}
    for lane in range(n_lanes):
        options = {"seq_len": seq_len, "shuffle": shuffle, "seed": seed}
        packer = make_lane(small_tokenizer, texts, lane, n_lanes, **options)
        for turn, ids in enumerate(take(packer, n_turns)[1]):
            found[lane + turn * n_lanes] = ids
    for epoch in range(2):
        held = [found[epoch * len(texts) + i] for i in range(len(texts))]
        assert sorted(held) == sorted(expected)
        assert (held == expected) is not shuffle
    if shuffle:
        assert [found[i] for i in range(23)] != [found[23 + i] for i in range(23)]


def test_only_what_fits_is_transformed(small_tokenizer):
    """And what is cut never is, and both happen."""
    tokenizer = small_tokenizer
    lane = make_lane(tokenizer, seq_len=64, fim_rate=1.0)
    plain = {tuple(tokenizer.encode(text, bos=True, eos=True)) for text in TEXTS}
    markers = {tokenizer.prefix_id, tokenizer.suffix_id, tokenizer.middle_id, tokenizer.eot_id}
    rows, documents = take(lane, 180)
    n_transformed = n_cut = begin = 0
    for ids in documents:
        n_remaining = 64 - begin % 64
        if markers & set(ids):
            n_transformed += 1
            assert len(ids) <= n_remaining
            before, suffix = parts_of(tokenizer, ids[1:-1])
            assert before + suffix in TEXTS
        else:
            assert tuple(ids) in plain
            # Four markers more, and a cut can cost some tokens: nearly all that fit are drawn.
            assert len(ids) + 4 > n_remaining - 8
            n_cut += len(ids) > n_remaining
        begin += len(ids)
    assert n_transformed > 40
    assert n_cut > 20
    assert len(rows) > 40


def test_rate_holds_for_documents_that_fit(small_tokenizer):
    texts = ["x = 1\n"] * 500
    lane = make_lane(small_tokenizer, texts, seq_len=4096, fim_rate=0.9)
    _, documents = take(lane, 500)
    n = sum(small_tokenizer.prefix_id in ids for ids in documents)
    assert n / 500 == pytest.approx(0.9, abs=0.07)


def test_splits_are_fresh_in_every_epoch_and_the_same_in_every_run(small_tokenizer):
    texts = ["def f(value):\n    return value + 1\n", "for x in y:\n    print(x)\n"]
    options = {"seq_len": 128, "fim_rate": 1.0, "shuffle": False}

    def documents(**changes):
        return take(make_lane(small_tokenizer, texts, **(options | changes)), 8)[1]

    first = documents()
    assert first == documents()
    assert first != documents(seed=1)
    for i in (0, 1):
        assert len({tuple(ids) for ids in first[i::2]}) > 1


def test_split_of_a_document_does_not_depend_on_its_place(small_tokenizer):
    texts = [f"def f{i}(value):\n    return value + {i}\n" for i in range(5)]
    options = {"seq_len": 512, "fim_rate": 1.0, "shuffle": False}
    alone = take(make_lane(small_tokenizer, texts, 0, 1, **options), 5)[1]
    for lane in range(5):
        assert take(make_lane(small_tokenizer, texts, lane, 5, **options), 1)[1][0] == alone[lane]


@given(st.integers(0, 60), st.sampled_from([0.0, 0.9]), st.sampled_from([None, 40]))
@settings(max_examples=25, deadline=None)
def test_resumed_lane_continues(small_tokenizer, n_before, fim_rate, max_chars):
    options = {"fim_rate": fim_rate, "max_document_chars": max_chars, "lane": 1, "n_lanes": 3}
    lane = make_lane(small_tokenizer, **options)
    for _ in range(n_before):
        lane.next_sequence()
    state = LaneState(*list(lane.state))  # as it comes back from JSON
    resumed = make_lane(small_tokenizer, state=state, **options)
    for _ in range(5):
        expected, found = lane.next_sequence(), resumed.next_sequence()
        assert all((a == b).all() for a, b in zip(expected, found, strict=True))
        assert resumed.state == lane.state


def test_long_document_over_many_rows(small_tokenizer):
    text = "x = 1\n" * 2000
    lane = make_lane(small_tokenizer, [text], seq_len=17)
    _, documents = take(lane, 2)
    assert documents == [small_tokenizer.encode(text, bos=True, eos=True)] * 2


def test_each_epoch_takes_the_next_part_of_a_document(small_tokenizer):
    text = "".join(f"x{i} = {i}\n" for i in range(30))
    name = f"0/{TextList([text]).sha256(0)}"
    parts = split_document(text, part_limit(20, random.Random(name)))
    assert len(parts) > 10
    lane = make_lane(small_tokenizer, [text], seq_len=17, max_document_chars=20)
    rows, _ = take(lane, 2 * len(parts))
    taken = [small_tokenizer.decode(ids) for ids in documents_of(rows, small_tokenizer)]
    first = parts.index(taken[0])
    assert first > 0, "every document would begin with its head"
    turned = parts[first:] + parts[:first]
    assert taken[: 2 * len(parts)] == turned * 2


def test_limits_of_parts_are_spread():
    rng = random.Random(0)
    limits = [part_limit(2400, rng) for _ in range(2000)]
    assert min(limits) >= 300
    assert max(limits) <= 2400
    thirds = [sum(a <= x < 2 * a for x in limits) for a in (300, 600, 1200)]
    assert all(abs(n - 2000 / 3) < 100 for n in thirds)
    assert part_limit(None, rng) is None


def test_empty_corpus_is_named(small_tokenizer):
    with pytest.raises(ValueError, match="no documents"):
        make_lane(small_tokenizer, [])


def test_lanes_of_ranks_are_a_partition():
    for world_size in (1, 2, 3, 4, 6, 12):
        lanes = [lane for rank in range(world_size) for lane in lanes_of_rank(12, rank, world_size)]
        assert lanes == list(range(12))
    with pytest.raises(ValueError, match="12 sequences a batch do not divide over 5 ranks"):
        lanes_of_rank(12, 0, 5)


def test_documents_that_fit_twice_may_stand_twice(small_tokenizer):
    texts = [f"value_{i} = {i}\n" for i in range(400)] + ["x" * 200] * 40
    lane = make_lane(small_tokenizer, texts, seq_len=128, repeat_rate=0.5)
    _, documents = take(lane, 440)
    bos, eos = small_tokenizer.bos_id, small_tokenizer.eos_id
    n_twice = 0
    for ids in documents:
        inner = ids[1:-1]
        half = len(inner) // 2
        is_twice = (
            len(inner) % 2 == 0
            and inner[:half] == inner[half:]
            and "value" in (small_tokenizer.decode(inner[:half]))
        )
        n_twice += is_twice
        assert (ids[0], ids[-1]) == (bos, eos)
        assert bos not in inner
        assert eos not in inner
        if not is_twice and "value" in small_tokenizer.decode(ids):
            assert small_tokenizer.decode(ids).count("value") == 1
    assert 120 < n_twice < 240, "half of those that fit"


def test_middles_count_more(small_tokenizer):
    texts = [f"def f{n}(a, b):\n    return a + {n} * b\n" for n in range(20)]
    options = {"seq_len": 512, "fim_rate": 1.0, "spm_share": 0.0, "fim_middle_weight": 4.0}
    row = make_lane(small_tokenizer, texts, **options).next_sequence()
    middle_id, eot_id = small_tokenizer.middle_id, small_tokenizer.eot_id
    n_transformed = 0
    for document in range(int(row.document_ids.max()) + 1):
        own = row.document_ids == document
        inputs, weights = row.tokens[own].tolist(), row.loss_weights[own].tolist()
        if middle_id in inputs and eot_id in inputs:  # else it was cut
            n_transformed += 1
            at, end = inputs.index(middle_id), inputs.index(eot_id)
            assert weights == [1] * at + [4] * (end - at) + [1, 0]
            assert row.targets[own][at:-2].tolist() == inputs[at + 1 : -1]
    assert n_transformed > 5
    all_of_it = make_lane(small_tokenizer, texts, **options | {"fim_middle_weight": 1.0})
    assert row.tokens.tolist() == all_of_it.next_sequence().tokens.tolist()
