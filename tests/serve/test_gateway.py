"""The gateway: our dialects and prompts in front of other servers, some of which fail."""

import httpx
import pytest
from servers import free_port, in_thread, listening, process

from codellama import SamplingParams
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


def test_a_cluster_that_is_not_there(engine):
    """Not ready before a server answers."""
    endpoint = Endpoint(f"http://127.0.0.1:{free_port()}", tokenizer=engine.tokenizer)
    service = Service(endpoint, engine.tokenizer, "codellama", {})
    with in_thread(engine, load=lambda: service) as (url, _):
        assert httpx.get(f"{url}/health").status_code == 503
        body = {"prompt": "a", "max_tokens": 1}
        assert httpx.post(f"{url}/v1/completions", json=body).status_code == 503
