"""Clients that leave, more clients than places, failures, and the end."""

import asyncio
import json
import random
import signal
import socket
import statistics
import threading
import time

import httpx
import pytest
from servers import gauge, in_thread, process, wait_for

from codellama import Engine, SamplingParams
from codellama.serve import Limits, replies

OTHER = {"user-agent": "another editor"}
LONG = {"prompt": "a", "max_tokens": 900, "temperature": 0, "logit_bias": {"2": -100.0}}


def blocks(engine):
    return engine._scheduler.pool.n_used


async def leave(client, rng, engine):
    """Ask, and go at a random moment; returns once the request is known to be under way."""
    kind = rng.choice(["whole", "stream", "infill", "ollama"])
    path, body = {
        "whole": ("/v1/completions", LONG | {"n": rng.choice([1, 3])}),
        "stream": ("/v1/completions", LONG | {"stream": True}),
        "infill": ("/infill", {"input_prefix": "a", "input_suffix": "", "n_predict": 900}),
        "ollama": ("/api/generate", {"prompt": "a", "options": {"num_predict": 900}}),
    }[kind]
    task = asyncio.create_task(client.post(path, json=body))
    await asyncio.sleep(rng.choice([0, 0.001, 0.01, 0.1, 0.3]))
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def leave_many(url, count, engine):
    rng = random.Random(1)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
        for _ in range(count // 10):
            await asyncio.gather(*(leave(client, rng, engine) for _ in range(10)))


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_who_leaves_frees_everything(engine, count):
    with in_thread(engine, Limits(max_texts=256)) as (url, service):
        asyncio.run(leave_many(url, count, engine))
        wait_for(lambda: service.n_texts == 0 and blocks(engine) == 0, 2)
        wait_for(
            lambda: "codellama-engine" not in {thread.name for thread in threading.enumerate()}
        )
        assert gauge(url, "running") == gauge(url, "waiting") == 0
        assert service.n_tokens == 0
        reply = httpx.post(f"{url}/v1/completions", json=LONG | {"max_tokens": 8})
        [expected] = engine.complete(["a"], SamplingParams(8, logit_bias=((2, -100.0),)))
        assert reply.json()["choices"][0]["text"] == expected.text


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_ends_the_generation_at_once(engine, stream):
    """Streaming or not; between the client's going and free blocks there is a step at most."""
    with in_thread(engine) as (url, service):

        async def go():
            async with httpx.AsyncClient(base_url=url, timeout=60) as client:
                body = LONG | {"stream": stream}
                task = asyncio.create_task(client.post("/v1/completions", json=body))
                while gauge_of(service) == 0:
                    await asyncio.sleep(0.005)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

        asyncio.run(go())
        assert wait_for(lambda: blocks(engine) == 0 and service.n_texts == 0, 5) < 0.3


@pytest.mark.parametrize("stream", [True, False])
def test_a_closed_socket_frees_the_engine_within_50_ms(engine, stream):
    """From close() to free blocks; the median of nine, since a scheduler may pause any of them."""
    body = json.dumps(LONG | {"stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
    request = f"{head}content-type: application/json\r\n\r\n".encode() + body
    durations = []
    with in_thread(engine) as (url, service):
        for _ in range(9):
            client = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])))
            client.sendall(request)
            wait_for(lambda: gauge_of(service) == 1)
            assert blocks(engine) > 0
            begin = time.perf_counter()
            client.close()
            while blocks(engine):
                time.sleep(0.0005)
            durations.append(time.perf_counter() - begin)
            wait_for(lambda: service.n_texts == 0)
    assert statistics.median(durations) < 0.05, durations


def gauge_of(service):
    return service.metrics.running._value.get()


async def crowd(url, count):
    """(status, seconds, headers, JSON) of many at once, and how long /health takes meanwhile."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:

        async def one(number):
            begin = time.monotonic()
            body = {"prompt": f"x = {number}\n", "max_tokens": 16, "temperature": 0}
            reply = await client.post("/v1/completions", json=body)
            return reply, time.monotonic() - begin

        health = []

        async def watch():
            while True:
                begin = time.monotonic()
                await client.get("/health")
                health.append(time.monotonic() - begin)
                await asyncio.sleep(0.05)

        watching = asyncio.create_task(watch())
        replies = await asyncio.gather(*map(one, range(count)))
        watching.cancel()
    return replies, health


@pytest.mark.parametrize("count", [80, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_crowd(engine, count):
    """What is admitted is right; the others hear 429 and when to come again."""
    with in_thread(engine, Limits(max_texts=24)) as (url, service):
        replies, health = asyncio.run(crowd(url, count))
        statuses = [reply.status_code for reply, _ in replies]
        assert set(statuses) == {200, 429}
        assert statuses.count(200) >= 24
        assert service.n_texts == 0
    for number, (reply, _) in enumerate(replies):
        if reply.status_code == 429:
            assert int(reply.headers["retry-after"]) > 0
            assert reply.json()["error"]["type"] == "rate_limit_error"
        else:
            [expected] = engine.complete([f"x = {number}\n"], SamplingParams(16))
            assert reply.json()["choices"][0]["text"] == expected.text
    assert max(health) < 5 * count / 80  # seconds; this process is the crowd, too


def test_a_long_wait_keeps_the_line_open(engine, monkeypatch):
    """The first token takes its time: comments come before it, and the text is whole."""
    run = engine._runner.run
    monkeypatch.setattr(engine._runner, "run", lambda plan: (time.sleep(0.3), run(plan))[1])
    monkeypatch.setattr(replies, "PING_S", 0.05)
    with in_thread(engine) as (url, _):
        body = LONG | {"max_tokens": 2, "stream": True}
        lines = httpx.post(f"{url}/v1/completions", json=body).text.split("\n\n")
        assert lines[0] == ": wait"
        assert lines[-2:] == ["data: [DONE]", ""]
        assert any('"finish_reason":"length"' in line for line in lines)


def test_limits_of_the_operator(engine):
    limits = Limits(max_texts=4, max_total_tokens=500, max_new_tokens=300, timeout_s=0.3)
    with in_thread(engine, limits) as (url, _):

        def status(**body):
            return httpx.post(f"{url}/v1/completions", json=LONG | body).status_code

        assert status(n=5, max_tokens=1) == 400
        assert status(max_tokens=301) == 400
        assert status(n=4, max_tokens=200) == 400
        assert status(max_tokens=8) == 200
        assert status(max_tokens=300) in (200, 504)
        lines = httpx.post(f"{url}/v1/completions", json=LONG | {"max_tokens": 300, "stream": True})
        assert "[DONE]" in lines.text or '"timeout_error"' in lines.text


def test_the_newest_request_of_a_client_wins(engine):
    with in_thread(engine, Limits(newest_wins=True)) as (url, service):
        plain = LONG | {"max_tokens": 60}
        gap = LONG | {"suffix": "b"}

        async def go():
            async with httpx.AsyncClient(base_url=url, timeout=60) as client:
                older = asyncio.create_task(client.post("/v1/completions", json=gap))
                other = asyncio.create_task(
                    client.post("/v1/completions", json=plain | {"suffix": "b"}, headers=OTHER)
                )
                chat = asyncio.create_task(client.post("/v1/completions", json=plain))
                while service.n_texts < 3:
                    await asyncio.sleep(0.005)
                newer = await client.post("/v1/completions", json=gap | {"max_tokens": 2})
                return [
                    reply.status_code for reply in (await older, newer, await other, await chat)
                ]

        assert asyncio.run(go()) == [409, 200, 200, 200]


def test_a_failure_of_one_is_not_that_of_others(engine, monkeypatch):
    """Logits that are no numbers: that request gets a 500 with a number, the other its text."""
    run = engine._runner.run

    def poisoned(plan):
        results = run(plan)
        return [
            ValueError("not a number") if sequence.tokens[1:2] == victim else result
            for (sequence, _), result in zip(plan, results, strict=True)
        ]

    victim = engine.tokenizer.encode("zebra")[:1]
    monkeypatch.setattr(engine._runner, "run", poisoned)
    with in_thread(engine) as (url, _):

        async def go():
            async with httpx.AsyncClient(base_url=url, timeout=60) as client:
                bodies = [LONG | {"prompt": text, "max_tokens": 8} for text in ("zebra", "a")]
                bodies.append(bodies[0] | {"stream": True})
                sent = [client.post("/v1/completions", json=body) for body in bodies]
                return await asyncio.gather(*sent)

        bad, good, streamed = asyncio.run(go())
        assert (bad.status_code, streamed.status_code) == (500, 500)
        assert "error " in bad.json()["error"]["message"]
        [expected] = engine.complete(["a"], SamplingParams(8, logit_bias=((2, -100.0),)))
        assert good.json()["choices"][0]["text"] == expected.text
        assert httpx.get(f"{url}/health").status_code == 200


def test_a_crash_of_the_engine_is_told(monkeypatch):
    engine = Engine()
    with in_thread(engine) as (url, service):

        async def go():
            async with httpx.AsyncClient(base_url=url, timeout=60) as client:
                bodies = (LONG, LONG | {"stream": True})
                tasks = [
                    asyncio.create_task(client.post("/v1/completions", json=body))
                    for body in bodies
                ]
                while gauge_of(service) < 2:
                    await asyncio.sleep(0.01)
                monkeypatch.setattr(engine._batcher, "_try_step", lambda: 1 / 0)
                return await asyncio.gather(*tasks)

        whole, streamed = asyncio.run(go())
        assert whole.status_code == 500
        assert '"server_error"' in streamed.text.splitlines()[-2]
        health = httpx.get(f"{url}/health")
        assert (health.status_code, health.json()["error"]["code"]) == (503, 503)
        assert httpx.post(f"{url}/v1/completions", json=LONG).status_code == 503


def test_while_loading(engine):
    with in_thread(engine, load=lambda: time.sleep(1)) as (url, _):
        reply = httpx.get(f"{url}/health")
        assert (reply.status_code, reply.json()["error"]["message"]) == (503, "Loading model")
        reply = httpx.post(f"{url}/v1/completions", json=LONG)
        assert reply.status_code == 503


def test_a_model_that_does_not_load(tmp_path):
    with process(str(tmp_path), ready=False) as (_, child):
        _, log = child.communicate(timeout=60)
        assert child.returncode == 1
        assert log.strip().splitlines()[-1].startswith(f"codellama: {tmp_path}: no model")


@pytest.mark.parametrize(("grace", "finishes"), [(30, True), (0.2, False)])
def test_sigterm_under_load(grace, finishes):
    """What is under way finishes, or is cut off after the limit; exit code 0 either way."""
    with process("--grace", str(grace)) as (url, child):

        async def go():
            async with httpx.AsyncClient(base_url=url, timeout=60) as client:
                body = LONG | {"max_tokens": 100 if finishes else 1000, "n": 2}
                tasks = [
                    asyncio.create_task(client.post("/v1/completions", json=body | {"stream": s}))
                    for s in (True, False)
                ]
                while gauge(url, "running") < 4:
                    await asyncio.sleep(0.01)
                child.send_signal(signal.SIGTERM)
                return await asyncio.gather(*tasks)

        streamed, whole = asyncio.run(go())
        child.wait(timeout=20)
        assert child.returncode == 0
    if finishes:
        assert streamed.text.rstrip().endswith("[DONE]")
        assert whole.status_code == 200
    else:
        assert '"the server ends"' in streamed.text
        assert whole.status_code == 503
