"""The Endpoint over real connections: equal to the engine behind, whatever fails on the way."""

import asyncio
import json
import threading
import time

import pytest
from faulty_server import Parrot, listening

from codellama.cli import run_command
from codellama.engine import Engine, Piece, SamplingParams
from codellama.engine.endpoint import Endpoint
from codellama.engine.upstream import FailedError, Upstream
from codellama.eval import sampling
from codellama.eval.task import Problem, Prompt, Task
from codellama.serve import Service, create_app

PROMPTS = ["def add(a, b):\n    return", "import os", "x", "for i in range(10):\n    print(i", "é"]
BACKWARDS = [text[::-1] for text in PROMPTS]
GAPS = [("def f(x):\n    ", "\n    return y\n"), ("", "\n\nprint(1)\n")]
DIALOGS = [[{"role": "user", "content": "hi"}], [{"role": "user", "content": "print(1)"}]]
FULL = SamplingParams(12, temperature=0.8, top_p=0.9, min_p=0.01, seed=5, logprobs=True)


@pytest.fixture(scope="module")
def engine(long_model, small_tokenizer):
    return Engine.of(long_model, small_tokenizer.with_chat_format("inst"))


@pytest.fixture(scope="module")
def served(engine):
    """The address of our own server around the engine."""
    with listening(create_app(lambda: Service(engine, engine.tokenizer, "m", {}))) as url:
        while asyncio.run(Endpoint(url).check())[url + "/v1"]:  # the model is not there yet
            time.sleep(0.01)
        yield url


@pytest.fixture
def parrots():
    first, second = Parrot(), Parrot()
    with listening(first.app) as first.url, listening(second.app) as second.url:
        yield first, second


@pytest.fixture
def endpoint(parrots):
    return Endpoint([parrot.url for parrot in parrots], timeout_s=1.0)


def texts_of(results):
    return [result.text for result in results]


def same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert (a.text, a.token_ids, a.finish_reason) == (b.text, b.token_ids, b.finish_reason)
        assert (a.logprobs or ()) == pytest.approx(b.logprobs or (), abs=1e-4)


def test_equals_the_engine_behind(engine, served):
    endpoint = Endpoint([served, served], tokenizer=engine.tokenizer)
    same(endpoint.complete(PROMPTS, FULL), engine.complete(PROMPTS, FULL))
    for settings in (
        {"n": 3, "stop": ("\n",), "repetition_penalty": 1.2, "presence_penalty": 0.2},
        {"logit_bias": ((9, 5.0),), "frequency_penalty": 0.1, "top_k": 40},
        {"schema": '{"enum": ["red", "green"]}'},
    ):
        params = SamplingParams(6, temperature=1.0, seed=3, **settings)
        same(endpoint.complete(PROMPTS, params), engine.complete(PROMPTS, params))
    for suffix_first in (False, True):
        same(endpoint.infill(GAPS, FULL, suffix_first), engine.infill(GAPS, FULL, suffix_first))
    same(endpoint.chat(DIALOGS, FULL), engine.chat(DIALOGS, FULL))
    assert "".join(endpoint.stream(PROMPTS[0], FULL)) == engine.complete(PROMPTS[:1], FULL)[0].text
    texts = [*PROMPTS, [7, 8]]
    for a, b in zip(endpoint.score(texts), engine.score(texts), strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    assert (endpoint.max_context, endpoint.model) == (engine.max_context, "m")


def test_pieces_and_top_logprobs(engine, served):
    ids = engine.tokenizer.encode(PROMPTS[0], bos=True)
    params = SamplingParams(8, logprobs=True, top_logprobs=3)
    endpoint = Endpoint(served, tokenizer=engine.tokenizer)

    async def collect(source):
        return [piece async for piece in source.pieces(ids, params, (engine.tokenizer.eos_id,))]

    ours, theirs = asyncio.run(collect(endpoint)), asyncio.run(collect(engine))
    assert "".join(p.text for p in ours) == "".join(p.text for p in theirs)
    assert sum((p.token_ids for p in ours), ()) == sum((p.token_ids for p in theirs), ())
    first = [[row[0][1] for p in pieces for row in p.top_logprobs] for pieces in (ours, theirs)]
    assert first[0] == pytest.approx(first[1], abs=1e-4)
    assert (ours[-1].finish_reason, ours[-1].n_cached) == ("length", theirs[-1].n_cached)


def test_ids_of_likely_tokens_as_vllm_writes_them():
    rows = {"token_logprobs": [-0.5], "top_logprobs": [{"token_id:7": -0.5, "token_id:9": -1.5}]}
    choice = {"text": "x", "token_ids": [7], "logprobs": rows, "finish_reason": None}
    params = SamplingParams(logprobs=True, top_logprobs=2)
    piece = Upstream("http://x", None, None)._piece(choice, params)
    assert piece == Piece("x", (7,), (-0.5,), (((7, -0.5), (9, -1.5)),), None, 0)


def test_without_a_tokenizer_texts_are_sent(engine, served):
    endpoint = Endpoint(served, model="m")
    assert texts_of(endpoint.complete(PROMPTS)) == texts_of(engine.complete(PROMPTS))
    assert texts_of(endpoint.infill(GAPS)) == texts_of(engine.infill(GAPS))
    assert texts_of(endpoint.chat(DIALOGS)) == texts_of(engine.chat(DIALOGS))
    with pytest.raises(ValueError, match="suffix_first: an endpoint needs"):
        endpoint.infill(GAPS, suffix_first=True)


@pytest.mark.parametrize("fault", [500, 503, 429, "hang", "break", "garbage", "end"])
def test_whole_texts_survive_faults(fault, endpoint, parrots):
    for parrot in parrots:
        parrot.faults += [None, fault]
    assert texts_of(endpoint.complete(PROMPTS)) == BACKWARDS
    assert sum(parrot.n_asked for parrot in parrots) == len(PROMPTS) + 2
    assert endpoint.failure is None


def test_a_stream_is_not_begun_twice(endpoint, parrots):
    """Before the first text another server is asked; after it, nothing can be taken back."""
    parrots[0].faults = parrots[1].faults = [500]
    assert "".join(endpoint.stream("a\u2028b")) == "b\u2028a"
    parrots[0].faults = parrots[1].faults = ["break"]
    stream = endpoint.stream("abc")
    assert next(stream) == "c"
    with pytest.raises(ConnectionError, match=r"http://127\.0\.0\.1:\d+/v1: "):
        "".join(stream)


def test_refusals_are_said_at_once(endpoint, parrots):
    parrots[0].faults = parrots[1].faults = [400]
    with pytest.raises(ValueError, match=r":\d+/v1/completions: HTTP 400: .*no, because 400"):
        endpoint.complete(["x"])
    assert sum(parrot.n_asked for parrot in parrots) == 1
    with pytest.raises(ValueError, match=r"endpoint 'ftp://x': expected an address such as"):
        Endpoint("ftp://x")


def test_nobody_there(parrots):
    with listening(Parrot().app) as gone:
        pass
    alone = Endpoint(gone, n_attempts=2)
    for ask in (lambda: alone.complete(["x"]), lambda: alone.model):
        with pytest.raises(ConnectionError, match=gone):
            ask()
    assert gone in alone.failure
    both = Endpoint([gone, parrots[0].url])
    assert [problem is None for problem in asyncio.run(both.check()).values()] == [False, True]
    assert both.failure is None
    assert texts_of(both.complete(PROMPTS)) == BACKWARDS


def test_busy_servers_get_less_and_none_too_much(parrots):
    parrots[0].pause_s, parrots[1].pause_s = 0.4, 0.02
    endpoint = Endpoint([parrot.url for parrot in parrots], max_in_flight=4)
    endpoint.complete(["x"] * 60)
    slow, fast = parrots
    assert slow.n_asked + fast.n_asked == 60
    assert slow.n_asked < fast.n_asked / 2
    assert 4 <= max(slow.n_most, fast.n_most) <= 8


def test_a_busy_server_is_not_a_broken_one(parrots):
    """An evaluation waits for it; who has callers of their own hears at once how long to wait."""
    parrot = parrots[0]
    endpoint = Endpoint(parrot.url, n_attempts=3)
    parrot.faults = [429]
    assert texts_of(endpoint.complete(["abc"])) == ["cba"]

    async def ask():
        return [piece async for piece in endpoint.pieces("abc", SamplingParams(), ())]

    parrot.faults, parrot.n_asked = [429], 0
    for _ in range(2):
        with pytest.raises(FailedError, match="busy") as caught:
            asyncio.run(ask())
        assert 0 < caught.value.wait_s <= 1.0  # what the server said
    assert (endpoint.failure, parrot.n_asked) == (None, 1)
    time.sleep(caught.value.wait_s)
    assert "".join(piece.text for piece in asyncio.run(ask())) == "cba"


def test_pieces_are_bounded_too(parrots):
    parrots[0].pause_s = 0.02
    endpoint = Endpoint(parrots[0].url, max_in_flight=3)

    async def ask():
        return [piece async for piece in endpoint.pieces("abc", SamplingParams(), ())]

    async def ask_many():
        return await asyncio.gather(*(ask() for _ in range(12)))

    assert len(asyncio.run(ask_many())) == 12
    assert parrots[0].n_most == 3


def test_cancelling_ends_what_runs(parrots):
    """From another thread, and by closing a stream; the servers hear of it."""
    endpoint = Endpoint([parrot.url for parrot in parrots])
    parrots[0].faults = parrots[1].faults = ["hang"] * 5
    threading.Timer(0.5, endpoint.cancel).start()
    results = endpoint.complete(PROMPTS, on_text=lambda *_: None)
    assert {result.finish_reason for result in results} == {"cancelled"}
    stream = endpoint.stream("x" * 100_000)
    next(stream)
    stream.close()
    for _ in range(200):
        if not any(parrot.n_now for parrot in parrots):
            return
        time.sleep(0.05)
    raise AssertionError("a server still writes")


class Lines(Task):
    """Continues the prompts."""

    name = "lines"

    def load(self):
        return [Problem(str(i), {"text": text}) for i, text in enumerate(PROMPTS)]

    def prompt(self, problem):
        return Prompt(problem.row["text"])


def test_an_evaluation_goes_on_where_the_servers_failed(parrots, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "CHUNK", 2)
    decoding = sampling.Decoding(2, 0.8, seed=1)
    parrots[0].faults = [None] * 5 + [500]
    endpoint = Endpoint(parrots[0].url, max_in_flight=1, n_attempts=1)
    path = tmp_path / "samples.jsonl"
    with pytest.raises(ConnectionError, match=r"HTTP 500: .*no, because 500"):
        sampling.sample(endpoint, Lines(), path, decoding, {})
    assert len(path.read_text().splitlines()) == 5
    sampling.sample(endpoint, Lines(), path, decoding, {})
    found = [json.loads(line)["completion"] for line in path.read_text().splitlines()]
    assert found == [text for text in BACKWARDS for _ in range(2)]
    assert parrots[0].n_asked == 6 + 5


def test_eval_of_an_address(parrots, shared_data, tmp_path, capsys):
    command = ["eval", f"{parrots[0].url},{parrots[1].url}/v1", "--task", "lcc", "--limit=2"]
    command += ["--data", str(shared_data), "--out", str(tmp_path), "--json"]
    assert run_command(command) == 0
    assert json.loads(capsys.readouterr().out)["results"][0]["n_samples"] == 2
    assert sum(parrot.n_asked for parrot in parrots) == 2
    settings = json.loads((tmp_path / "lcc" / "samples.settings.json").read_text())
    assert settings["model"] == {"name": "parrot", "is_instruct": False, "chat": False}
    assert run_command(["eval", "--task", "lcc", "--name", "m"]) == 2
