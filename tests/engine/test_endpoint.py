"""The Endpoint over real connections: equal to the engine behind, whatever fails on the way."""

import asyncio
import json
import threading
import time

import pytest
from faulty_server import running

from codellama.cli import run_command
from codellama.engine import Engine, SamplingParams
from codellama.engine.endpoint import Endpoint
from codellama.eval import sampling
from codellama.eval.task import Problem, Prompt, Task

PROMPTS = ["def add(a, b):\n    return", "import os", "x", "for i in range(10):\n    print(i", "é"]
GAPS = [("def f(x):\n    ", "\n    return y\n"), ("", "\n\nprint(1)\n")]
DIALOGS = [[{"role": "user", "content": "hi"}], [{"role": "user", "content": "print(1)"}]]
FULL = SamplingParams(12, temperature=0.8, top_p=0.9, min_p=0.01, seed=5, logprobs=True)


@pytest.fixture(scope="module")
def engine(long_model, small_tokenizer):
    return Engine.of(long_model, small_tokenizer.with_chat_format("inst"))


@pytest.fixture
def servers(engine):
    with running(engine) as first, running(engine) as second:
        yield first, second


@pytest.fixture
def endpoint(engine, servers):
    return Endpoint([server.url for server in servers], tokenizer=engine.tokenizer, timeout_s=1.0)


def same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert (a.text, a.token_ids, a.finish_reason) == (b.text, b.token_ids, b.finish_reason)
        assert (a.logprobs or ()) == pytest.approx(b.logprobs or (), abs=1e-4)


def test_equals_the_engine_behind(engine, endpoint, servers):
    same(endpoint.complete(PROMPTS, FULL), engine.complete(PROMPTS, FULL))
    many = SamplingParams(6, temperature=1.0, seed=3, n=3, stop=("\n",), repetition_penalty=1.2)
    same(endpoint.complete(PROMPTS, many), engine.complete(PROMPTS, many))
    for suffix_first in (False, True):
        same(endpoint.infill(GAPS, FULL, suffix_first), engine.infill(GAPS, FULL, suffix_first))
    same(endpoint.chat(DIALOGS, FULL), engine.chat(DIALOGS, FULL))
    assert "".join(endpoint.stream(PROMPTS[0], FULL)) == engine.complete(PROMPTS[:1], FULL)[0].text
    texts = [*PROMPTS, [7]]
    for a, b in zip(endpoint.score(texts), engine.score(texts), strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    assert endpoint.max_context == engine.max_context
    assert all(server.bodies for server in servers)
    assert {body["model"] for server in servers for body in server.bodies} == {"m"}


def test_pieces_and_top_logprobs(engine, endpoint):
    ids = engine.tokenizer.encode(PROMPTS[0], bos=True)
    params = SamplingParams(8, logprobs=True, top_logprobs=3)

    async def collect(source):
        return [piece async for piece in source.pieces(ids, params, (engine.tokenizer.eos_id,))]

    ours, theirs = asyncio.run(collect(endpoint)), asyncio.run(collect(engine))
    assert "".join(p.text for p in ours) == "".join(p.text for p in theirs)
    assert sum((p.token_ids for p in ours), ()) == sum((p.token_ids for p in theirs), ())
    tops = [sum((p.top_logprobs for p in pieces), ()) for pieces in (ours, theirs)]
    assert [[i for i, _ in top] for top in tops[0]] == [[i for i, _ in top] for top in tops[1]]
    assert (ours[-1].finish_reason, ours[-1].n_cached) == ("length", theirs[-1].n_cached)


def test_without_a_tokenizer_texts_are_sent(engine, servers):
    endpoint = Endpoint(servers[0].url, model="m")
    for ours, theirs in (
        (endpoint.complete(PROMPTS), engine.complete(PROMPTS)),
        (endpoint.infill(GAPS), engine.infill(GAPS)),
        (endpoint.chat(DIALOGS), engine.chat(DIALOGS)),
    ):
        assert [r.text for r in ours] == [r.text for r in theirs]
    with pytest.raises(ValueError, match="suffix_first: an endpoint needs"):
        endpoint.infill(GAPS, suffix_first=True)


@pytest.mark.parametrize("fault", [500, 503, 429, "hang", "break", "garbage", "end"])
def test_whole_texts_survive_faults(fault, engine, endpoint, servers):
    """A third of the requests fail on either server; every result is the engine's all the same."""
    expected = engine.complete(PROMPTS, FULL)
    for server in servers:
        server.faults += [None, fault]
    same(endpoint.complete(PROMPTS, FULL), expected)
    assert not any(server.faults for server in servers)
    assert sum(len(server.bodies) for server in servers) == len(PROMPTS) + 2
    assert endpoint.failure is None


def test_a_stream_is_not_begun_twice(engine, endpoint, servers):
    """Before the first text another server is asked; after it, nothing can be taken back."""
    expected = engine.complete(PROMPTS[:1], SamplingParams(9))[0].text
    servers[0].faults = servers[1].faults = [500]
    assert "".join(endpoint.stream(PROMPTS[0], SamplingParams(9))) == expected
    servers[0].faults = servers[1].faults = ["break"]
    stream = endpoint.stream(PROMPTS[0], SamplingParams(9))
    assert expected.startswith(next(stream))
    with pytest.raises(ConnectionError, match=r"http://127\.0\.0\.1:\d+/v1: "):
        "".join(stream)


def test_refusals_are_said_at_once(endpoint, servers):
    servers[0].faults = servers[1].faults = [400]
    with pytest.raises(ValueError, match=r":\d+/v1/completions: HTTP 400: no, because 400"):
        endpoint.complete(PROMPTS[:1])
    assert sum(len(server.bodies) for server in servers) == 1
    with pytest.raises(ValueError, match=r"endpoint 'ftp://x': expected an address such as"):
        Endpoint("ftp://x")


def test_nobody_there(engine, servers):
    with running(engine) as gone:
        pass
    with pytest.raises(ConnectionError, match=gone.url):
        Endpoint(gone.url, tokenizer=engine.tokenizer, n_attempts=2).complete(["x"])
    both = Endpoint([gone.url, servers[0].url], tokenizer=engine.tokenizer)
    problems = asyncio.run(both.check())
    assert problems[servers[0].url + "/v1"] is None
    assert problems[gone.url + "/v1"]
    assert both.failure is None
    same(both.complete(PROMPTS), engine.complete(PROMPTS))
    alone = Endpoint(gone.url)
    asyncio.run(alone.check())
    assert gone.url in alone.failure
    with pytest.raises(ConnectionError, match=gone.url):
        _ = alone.model


def test_busy_servers_get_less_and_none_too_much(engine, servers):
    servers[0].pause_s = 0.2
    urls = [server.url for server in servers]
    endpoint = Endpoint(urls, tokenizer=engine.tokenizer, max_in_flight=4)
    endpoint.complete(["x"] * 60, SamplingParams(2))
    slow, fast = (len(server.bodies) for server in servers)
    assert slow + fast == 60
    assert slow < fast / 2
    assert 4 <= max(server.n_most for server in servers) <= 8


def test_cancelling_ends_what_runs(engine, endpoint, servers):
    """From another thread, by closing a stream, and of pieces; the servers hear of it."""
    for server in servers:
        server.pause_s = 20.0
    threading.Timer(0.3, endpoint.cancel).start()
    begin = time.monotonic()
    results = Endpoint.complete(endpoint, PROMPTS, SamplingParams(9), on_text=lambda *_: None)
    assert {result.finish_reason for result in results} == {"cancelled"}
    assert time.monotonic() - begin < 5
    for server in servers:
        server.pause_s = 0.0
    stream = endpoint.stream(PROMPTS[0], SamplingParams(400))
    next(stream)
    stream.close()
    for _ in range(100):
        if not any(server.n_now for server in servers):
            break
        time.sleep(0.05)
    engine._batcher.wait_until_idle()
    assert engine._scheduler.pool.n_used == 0


class Lines(Task):
    """Continues the prompts."""

    name = "lines"

    def load(self):
        return [Problem(str(i), {"text": text}) for i, text in enumerate(PROMPTS)]

    def prompt(self, problem):
        return Prompt(problem.row["text"], max_tokens=8)


def test_an_evaluation_goes_on_where_the_servers_failed(engine, servers, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "CHUNK", 2)
    decoding = sampling.Decoding(2, 0.8, seed=1)
    sampling.sample(engine, Lines(), tmp_path / "engine.jsonl", decoding, {})
    servers[0].faults = [None] * 5 + [500]
    endpoint = Endpoint(servers[0].url, tokenizer=engine.tokenizer, n_attempts=1)
    path = tmp_path / "endpoint.jsonl"
    with pytest.raises(ConnectionError, match="HTTP 500: no, because 500"):
        sampling.sample(endpoint, Lines(), path, decoding, {})
    assert len(path.read_text().splitlines()) == 4
    sampling.sample(endpoint, Lines(), path, decoding, {})
    assert path.read_bytes() == (tmp_path / "engine.jsonl").read_bytes()


def test_eval_of_an_address(engine, servers, shared_data, tmp_path, capsys):
    engine.tokenizer.save(tmp_path)
    command = ["eval", f"{servers[0].url},{servers[1].url}/v1", "--task", "lcc", "--limit=2"]
    command += ["--data", str(shared_data), "--out", str(tmp_path / "out"), "--json", "--no-chat"]
    assert run_command([*command, "--tokenizer", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["results"][0]["n_samples"] == 2
    assert isinstance(servers[0].bodies[0]["prompt"], list)
    assert sum(len(server.bodies) for server in servers) == 2
    settings = (tmp_path / "out" / "lcc" / "samples.settings.json").read_text()
    assert json.loads(settings)["model"] == {"name": "m", "is_instruct": True, "chat": False}
    assert run_command(["eval", "--task", "humaneval", "--name", "m"]) == 2
