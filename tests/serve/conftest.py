"""The shipped model, in this process and behind a server in one of its own."""

import httpx
import pytest
from servers import process

from codellama.engine import Engine


@pytest.fixture(scope="session")
def engine():
    """The shipped model; in float32, so that batch mates change no token."""
    return Engine(dtype="float32")


@pytest.fixture(scope="session")
def server():
    """The address of the shipped model in a process of its own."""
    with process("--dtype", "float32") as (url, _):
        yield url


@pytest.fixture(scope="session")
def post(server):
    """Post JSON, expect success, return JSON."""
    with httpx.Client(base_url=server, timeout=60) as client:

        def send(path, status=200, **body):
            reply = client.post(path, json=body)
            assert reply.status_code == status, reply.text
            return reply.json()

        yield send
