"""The pool against a plain count of users, over random calls."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pool_check import check

from codellama.engine.blocks import BlockPool, extend_digests


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_counts_over_random_calls(data):
    pool = BlockPool(7, 1)
    holders: list[list[int]] = []
    for _ in range(40):
        what = data.draw(st.sampled_from(["allocate", "share", "publish", "release"]))
        if what == "allocate" and pool.n_available:
            block = pool.allocate()
            assert all(block not in blocks for blocks in holders)
            holders.append([block])
        elif what == "allocate":
            with pytest.raises(IndexError):
                pool.allocate()
        elif what == "share":
            wanted = [bytes([n]) for n in data.draw(st.lists(st.integers(0, 4), max_size=3))]
            holders.append(pool.share(wanted))
        elif holders:
            place = data.draw(st.integers(0, len(holders) - 1))
            if what == "publish" and len(holders[place]) == 1:
                block = holders[place][0]
                if block not in pool._digests:
                    pool.publish(block, bytes([data.draw(st.integers(0, 4))]))
            elif what == "release":
                pool.release(holders.pop(place))
        check(pool, holders)
    for blocks in holders:
        pool.release(blocks)
    pool.forget()
    assert sorted(pool._free) == list(range(7))


def test_the_end_of_the_longest_unused_is_forgotten_first():
    pool = BlockPool(4, 1)
    first = [pool.allocate(), pool.allocate()]
    second = [pool.allocate(), pool.allocate()]
    for block, digest in zip(first + second, (b"a", b"b", b"c", b"d"), strict=True):
        pool.publish(block, digest)
    pool.release(first)
    pool.release(second)
    assert pool.share([b"a"]) == first[:1]  # used again: younger than the second now
    pool.release(first[:1])
    assert [pool.allocate() for _ in range(4)] == [first[1], *reversed(second), first[0]]


def test_a_shared_beginning_ends_at_the_first_unknown_block():
    pool = BlockPool(4, 1)
    blocks = [pool.allocate() for _ in range(3)]
    pool.publish(blocks[0], b"a")
    pool.publish(blocks[2], b"c")
    assert pool.share([b"a", b"b", b"c"]) == blocks[:1]


def test_digests_cover_everything_before():
    one: list[bytes] = []
    extend_digests(one, list(range(35)), 16)
    assert len(one) == 2
    extend_digests(one, list(range(48)), 16)
    whole: list[bytes] = []
    extend_digests(whole, list(range(48)), 16)
    assert one == whole
    assert len(set(one)) == 3
    changed: list[bytes] = []
    extend_digests(changed, [7, *range(1, 48)], 16)
    assert not set(changed) & set(one)
