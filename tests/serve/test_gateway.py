"""The gateway: our dialects and prompts in front of other servers, some of which fail."""

import httpx
import pytest
from servers import free_port, listening, process, wait_for

from codellama import SamplingParams

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


def test_health_is_that_of_the_cluster(server):
    """Not ready before a server is there, red when none is left."""
    port = free_port()
    with process("--upstream", f"http://127.0.0.1:{port}", ready=False) as (url, _):
        wait_for(lambda: status(url) == 503, 60)
        assert status(url) == 503


def status(url):
    try:
        return httpx.get(f"{url}/health").status_code
    except httpx.TransportError:
        return None
