"""A pool that all tests of a process share; it starts in the first one that needs it."""

import pytest

from codellama.sandbox import Pool


@pytest.fixture(scope="session")
def pool():
    with Pool(n_workers=2) as shared:
        yield shared
