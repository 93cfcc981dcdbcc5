import pytest
from projects import Driver


@pytest.fixture(scope="session")
def run_in_children():
    """Trains in child processes that can be killed, stopped or hindered."""
    driver = Driver()
    yield driver
    driver.close()
