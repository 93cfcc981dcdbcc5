"""Requests made from the OpenAPI document, and bytes that are almost right: no 500, no hang."""

import json
import random

import httpx
import pytest
import schemathesis
from schemathesis.engine import events, from_schema
from servers import in_thread

from any_weights import random_model, small_vocabulary
from codellama.engine import Engine
from codellama.serve import Limits


@pytest.fixture(scope="module")
def fuzzed():
    engine = Engine.of(random_model(), small_vocabulary())
    limits = Limits(max_texts=256, max_new_tokens=8, timeout_s=20)
    with in_thread(engine, limits) as (url, service):
        yield url
        assert service.n_texts == 0
        assert engine.failure is None


@pytest.mark.parametrize(
    ("count", "phase"), [(6, "fuzzing"), pytest.param(20, "coverage", marks=pytest.mark.slow)]
)
def test_requests_from_the_document(fuzzed, count, phase):
    """All checks of schemathesis; the phase `coverage` has every edge of every field."""
    settings = {
        # A schema cannot say how long the context is, which ids there are, that roles take turns.
        "checks": {"positive_data_acceptance": {"expected-statuses": ["2xx", 400, 501]}},
        "generation": {"max-examples": count},
        "phases": {
            "stateful": {"enabled": False},
            "examples": {"enabled": False},
            "coverage": {"enabled": phase == "coverage"},
        },
        "request-timeout": 30,
        "seed": 1,
    }
    config = schemathesis.Config.from_dict(settings)
    document = schemathesis.openapi.from_url(f"{fuzzed}/openapi.json", config=config)
    n_cases, failures = 0, []
    for event in from_schema(document).execute():
        assert not isinstance(event, (events.NonFatalError, events.FatalError)), event
        if isinstance(event, events.ScenarioFinished):
            n_cases += len(event.recorder.checks)
            nodes = [node for nodes in event.recorder.checks.values() for node in nodes]
            failures += [node.failure_info for node in nodes if node.failure_info]
    assert not [f"{failure.failure} {failure.code_sample}" for failure in failures]
    assert n_cases > 8 * count


@pytest.mark.parametrize("count", [150, pytest.param(5000, marks=pytest.mark.slow)])
def test_mutated_bytes(fuzzed, count):
    """Bodies as editors send them, with bytes changed, cut or doubled."""
    rng = random.Random(0)
    bodies = {
        "/v1/completions": {"prompt": "a", "max_tokens": 2, "stop": ["x"], "logit_bias": {"5": 1}},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "hé"}], "max_tokens": 2},
        "/infill": {"input_prefix": "a", "input_suffix": "b", "n_predict": 2, "n_cmpl": 2},
        "/api/generate": {"prompt": "a", "suffix": "b", "options": {"num_predict": 2}},
    }
    headers = {"content-type": "application/json"}
    with httpx.Client(base_url=fuzzed, timeout=30) as client:
        for _ in range(count):
            path, body = rng.choice(list(bodies.items()))
            data = bytearray(json.dumps(body, ensure_ascii=False).encode())
            for _ in range(rng.randint(1, 4)):
                at = rng.randrange(len(data))
                end = min(len(data), at + rng.randint(0, 6))
                data[at:end] = rng.choice(
                    [rng.randbytes(2), b"", data[at:end] * 2, b"9" * 12, b"["]
                )
            reply = client.post(path, content=bytes(data), headers=headers)
            assert reply.status_code < 500, (path, bytes(data), reply.text)
            if reply.status_code >= 400:
                error = reply.json()["error"]
                assert isinstance(error, str) if path.startswith("/api/") else error["message"]
