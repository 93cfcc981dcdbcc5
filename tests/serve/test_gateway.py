"""The gateway: our dialects and prompts in front of other servers, some of which fail."""

import asyncio
import contextlib
import json

import httpx
import pytest
from servers import free_port, gauge, in_thread, is_up, listening, process, wait_for

from any_weights import random_model, small_vocabulary
from codellama import Engine, SamplingParams
from codellama.engine.endpoint import Endpoint
from codellama.serve import Service

GAP = ("def area(r):\n    ", "\n    return a\n")


@pytest.fixture(scope="module")
def asked():
    """What the failing server was asked."""
    return []


@pytest.fixture(scope="module")
def gateway(server, asked):
    """In front of three: one that is not there, one that fails, and the shipped model."""

    async def failing(scope, receive, send):
        asked.append(scope["path"])
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    with listening(failing) as broken:
        urls = f"http://127.0.0.1:{free_port()},{broken},{server}/v1"
        with process("--upstream", urls) as (url, _):
            yield url


def test_exact_prompts_through_a_cluster(gateway, engine, asked):
    """Infilling, completion and chat are the engine's own, whichever server answers."""
    with httpx.Client(base_url=gateway, timeout=60) as client:

        def text(path, **body):
            reply = client.post(path, json=body | {"max_tokens": 12, "temperature": 0})
            assert reply.status_code == 200, reply.text
            choice = reply.json()["choices"][0]
            return choice["text"] if "text" in choice else choice["message"]["content"]

        params = SamplingParams(max_tokens=12)
        for _ in range(3):
            found = text("/v1/completions", prompt=GAP[0], suffix=GAP[1])
            assert found == engine.infill([GAP], params)[0].text
        messages = [{"role": "user", "content": "Say hi."}]
        found = text("/v1/chat/completions", messages=messages)
        assert found == engine.chat([messages], params)[0].text
        body = {"input_prefix": GAP[0], "input_suffix": GAP[1], "n_predict": 12}
        reply = client.post("/infill", json=body).json()
        assert engine.infill([GAP], params)[0].text.startswith(reply["content"])
        models = client.get("/v1/models").json()["data"]
        assert models[0]["max_model_len"] == 1024
        assert asked


@contextlib.contextmanager
def gateway_to(engine, *urls, **settings):
    """A gateway in this process; yields its address as soon as it listens."""
    endpoint = Endpoint(urls, tokenizer=engine.tokenizer, **settings)
    service = Service(endpoint, engine.tokenizer, "codellama", {})
    with in_thread(engine, load=lambda: service) as (url, _):
        yield url


def test_a_server_of_another_vocabulary_is_not_used(engine, caplog):
    """Ids would mean other texts there: not ready where it is alone, passed over beside another."""
    other, params = Engine.of(random_model(), small_vocabulary()), SamplingParams(max_tokens=4)
    with in_thread(other) as (url, _), in_thread(engine) as (good, _):
        with gateway_to(engine, url) as gateway:
            wait_for(lambda: "its ids are not those of the tokenizer" in caplog.text)
            assert httpx.get(f"{gateway}/health").status_code == 503
        found = Endpoint([url, good], tokenizer=engine.tokenizer).complete(["x = 1\n"] * 6, params)
        assert {f.text for f in found} == {engine.complete(["x = 1\n"], params)[0].text}
        endpoint = Endpoint(url, tokenizer=engine.tokenizer, n_attempts=1)
        with pytest.raises(ConnectionError, match="its ids are not those of the tokenizer"):
            endpoint.complete(["x = 1\n"], params)


@pytest.mark.parametrize(("answer", "told"), [(429, 429), (500, 503), (422, 400)])
def test_what_a_client_hears_of_a_cluster(engine, caplog, answer, told):
    """Whether to come again, and when; not the addresses and words of other servers.

    One that is busy is not broken: it is still there for `/health`, and is left alone meanwhile.
    """
    asked = []

    async def far(scope, receive, send):
        known = {"/v1/models": (200, {"data": [{"id": "m", "max_model_len": 1024}]})}
        status, body = known.get(scope["path"], (404, {}))
        if scope["path"] == "/v1/completions":
            status, body = answer, {"error": {"message": "secret words"}}
            asked.append(1)
        headers = [(b"retry-after", b"7")] * (status == 429)
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(body).encode()})

    with listening(far) as there, gateway_to(engine, there, n_attempts=2) as url:
        wait_for(lambda: is_up(url))
        for stream in (False, True):
            body = {"prompt": "zebra", "max_tokens": 4, "stream": stream}
            reply = httpx.post(f"{url}/v1/completions", json=body, timeout=30)
            assert reply.status_code == told
            assert not any(word in reply.text for word in ("secret", "127.0.0.1", "zebra"))
            if told != 400:
                assert 1 <= int(reply.headers["retry-after"]) <= 7
            if told == 429:
                assert is_up(url)
                assert len(asked) == 1
    assert "secret" not in caplog.text
    assert "zebra" not in caplog.text


def test_another_server_takes_over(engine):
    """One of two servers is killed while it writes: only streams that it had begun fail."""
    with (
        process("--dtype", "float32") as (first, child),
        in_thread(engine) as (second, _),
        gateway_to(engine, first, second) as url,
    ):
        wait_for(lambda: is_up(url), 60)
        body = {"max_tokens": 200, "temperature": 0, "logit_bias": {"2": -100}}

        async def go():
            async with httpx.AsyncClient(base_url=url, timeout=None) as client:

                def ask(number):
                    texts = body | {"prompt": f"x = {number}\n", "stream": number % 2 == 0}
                    return asyncio.create_task(client.post("/v1/completions", json=texts))

                begun = [ask(number) for number in range(8)]
                while gauge(first, "running") < 2:
                    await asyncio.sleep(0.01)
                child.kill()
                later = [ask(number) for number in range(8, 12)]
                return await asyncio.gather(*begun), await asyncio.gather(*later)

        begun, later = asyncio.run(go())
        assert {reply.status_code for reply in later} == {200}
        broken = [r for r in begun if r.status_code == 503 or '"unavailable_error"' in r.text]
        assert len(broken) <= 4  # of the eight, one half was there
        params = SamplingParams(200, logit_bias=((2, -100.0),))
        for number in range(1, 12, 2):  # what nobody had seen yet was asked again
            [expected] = engine.complete([f"x = {number}\n"], params)
            reply = (begun + later)[number]
            assert reply.json()["choices"][0]["text"] == expected.text


def test_a_cluster_that_is_not_there(engine):
    """Not ready before a server answers."""
    endpoint = Endpoint(f"http://127.0.0.1:{free_port()}", tokenizer=engine.tokenizer)
    service = Service(endpoint, engine.tokenizer, "codellama", {})
    with in_thread(engine, load=lambda: service) as (url, _):
        assert httpx.get(f"{url}/health").status_code == 503
        body = {"prompt": "a", "max_tokens": 1}
        assert httpx.post(f"{url}/v1/completions", json=body).status_code == 503
