"""What must hold of a block pool at any time, and the end of what runs."""


def check(pool, holders):
    """Raise unless every block is free, idle, or used by exactly the sequences that hold it."""
    users = [0] * pool.n_blocks
    for blocks in holders:
        for block in blocks:
            users[block] += 1
    assert users == pool._n_users
    unused = [block for block, n in enumerate(users) if n == 0]
    assert sorted([*pool._free, *pool._idle]) == unused
    assert pool.n_available == len(unused)
    assert pool.n_used == pool.n_blocks - len(unused)
    assert {block: digest for digest, block in pool._known.items()} == pool._digests
    assert set(pool._idle) <= set(pool._digests)


def wait_until_idle(engine):
    """Return once the engine's thread has ended."""
    if (thread := engine._batcher._thread) is not None:
        thread.join()
