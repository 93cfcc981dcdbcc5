"""The engine against the slow reference and against Transformers, on random float32 weights."""

import asyncio
import threading
import time
from contextlib import aclosing

import pytest
import torch
from pool_check import check, wait_until_idle

from codellama.engine import Engine, SamplingParams
from codellama.engine.generator import Ask
from codellama.engine.reference import generate_greedy
from codellama.model.config import ModelConfig
from codellama.model.transformer import Transformer

PROMPTS = [
    "def add(a, b):\n    return",
    "import os",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, x):\n",
    "x",
    "for i in range(10):\n    print(i",
]


@pytest.fixture(scope="module")
def model(small_tokenizer):
    config = ModelConfig(64, 3, 4, 2, 128, small_tokenizer.vocab_size, max_position_embeddings=96)
    # A wide initialisation: confident, varied predictions, far from ties.
    model = Transformer(config.replace(initializer_range=0.4))
    model.initialise(torch.Generator().manual_seed(5))
    return model.eval().requires_grad_(False)


@pytest.fixture
def engine(model, small_tokenizer):
    return Engine.of(model, small_tokenizer, max_batch=3)


def submit(engine, ids):
    """A sequence of 60 tokens that nobody waits for."""
    sequence = engine._sequence(Ask(ids, params=SamplingParams(max_tokens=60)))
    engine._batcher.submit(sequence, lambda: None, True)
    return sequence


def is_empty(engine):
    """Whether nothing runs, waits, or holds a block."""
    wait_until_idle(engine)
    check(engine._scheduler.pool, [])
    assert not engine._batcher._listeners
    assert not engine._batcher._streamed
    return not engine._scheduler.running and not engine._scheduler.n_waiting


def slow_down(engine, monkeypatch, seconds=0.005):
    """Make every step take a while, so that what happens meanwhile is certain to."""
    run = engine._runner.run
    monkeypatch.setattr(engine._runner, "run", lambda plan: (time.sleep(seconds), run(plan))[1])


def greedy(model, tokenizer, prompt, n, stops=()):
    ids = tokenizer.encode(prompt, bos=True) if isinstance(prompt, str) else prompt
    return generate_greedy(model, ids, n, {tokenizer.eos_id, *stops})


def test_batched_greedy_equals_reference(engine, model, small_tokenizer):
    """Five prompts of different lengths through a batch of three: they join and leave."""
    results = engine.complete(PROMPTS, SamplingParams(max_tokens=30, logprobs=True))
    for prompt, result in zip(PROMPTS, results, strict=True):
        ids, logprobs = greedy(model, small_tokenizer, prompt, 30)
        assert list(result.token_ids) == ids
        assert result.logprobs == pytest.approx(logprobs, abs=1e-4)
    assert is_empty(engine)


def test_greedy_equals_transformers_generate(engine, model, small_tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    from codellama.model.checkpoint import save_checkpoint

    save_checkpoint(tmp_path / "m", model.config, model.state_dict(), dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    for prompt in PROMPTS:
        ids = small_tokenizer.encode(prompt, bos=True)
        out = theirs.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            max_new_tokens=25,
            do_sample=False,
            pad_token_id=0,
        )[0, len(ids) :].tolist()
        ours = engine.complete([ids], SamplingParams(max_tokens=25))[0]
        if out[-1] == small_tokenizer.eos_id:
            out.pop()
        assert list(ours.token_ids) == out


def test_stream_equals_complete(engine):
    params = SamplingParams(max_tokens=40)
    for prompt in PROMPTS:
        assert "".join(engine.stream(prompt, params)) == engine.complete([prompt], params)[0].text


def test_seeded_sampling_does_not_depend_on_the_batch(engine):
    params = [SamplingParams(20, temperature=1.0, top_p=0.9, top_k=50, seed=s) for s in range(5)]
    together = engine.complete(PROMPTS, params)
    alone = [engine.complete([p], s)[0] for p, s in zip(PROMPTS, params, strict=True)]
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]
    again = engine.complete([PROMPTS[0]] * 2, [params[0], params[1]])
    assert again[0].token_ids == together[0].token_ids != again[1].token_ids


def test_n_results_of_one_prompt_differ_and_repeat(engine):
    params = SamplingParams(15, temperature=1.0, seed=7, n=4)
    first = engine.complete([PROMPTS[0]], params)
    assert len({r.token_ids for r in first}) == 4
    assert [r.token_ids for r in engine.complete([PROMPTS[0]], params)] == [
        r.token_ids for r in first
    ]


def test_stop_id_is_not_in_the_result(engine, model, small_tokenizer):
    ids = small_tokenizer.encode(PROMPTS[0], bos=True)
    free = engine.complete([ids], SamplingParams(max_tokens=30))[0].token_ids
    stop = free[10]
    result = engine._generate([Ask(ids, (stop,))], SamplingParams(max_tokens=30), None)[0]
    assert result.token_ids == free[: free.index(stop)]
    assert result.finish_reason == "stop"


def test_stop_string_across_tokens_ends_text_and_is_never_streamed(engine):
    free = engine.complete([PROMPTS[0]], SamplingParams(max_tokens=40))[0].text
    stop = free[12:17]
    params = SamplingParams(max_tokens=40, stop=(stop, "never there"))
    result = engine.complete([PROMPTS[0]], params)[0]
    assert result.text == free[: free.index(stop)]
    assert result.finish_reason == "stop"
    assert "".join(engine.stream(PROMPTS[0], params)) == result.text


def test_length_and_zero_tokens(engine):
    result = engine.complete([PROMPTS[0]], SamplingParams(max_tokens=3))[0]
    assert (len(result.token_ids), result.finish_reason) == (3, "length")
    empty = engine.complete([PROMPTS[0]], SamplingParams(max_tokens=0))[0]
    assert (empty.text, empty.token_ids, empty.finish_reason) == ("", (), "length")


def test_context_fills_up_and_ends(engine, small_tokenizer):
    ids = [1, *[300] * 90]
    result = engine.complete([ids], SamplingParams(max_tokens=50))[0]
    assert len(ids) + len(result.token_ids) <= 96
    with pytest.raises(ValueError, match=r"97 tokens.*context 96"):
        engine.complete([[1, *[300] * 96]])


def test_closing_a_stream_frees_its_blocks(engine, monkeypatch):
    slow_down(engine, monkeypatch)
    stream = engine.stream(PROMPTS[0], SamplingParams(max_tokens=60))
    next(stream)
    assert engine._scheduler.pool.n_used
    stream.close()
    wait_until_idle(engine)  # the pass that was under way, and no other
    assert engine._scheduler.pool.n_used == 0
    assert is_empty(engine)


def test_threads_share_the_batch_and_get_their_own_text(engine):
    params = SamplingParams(max_tokens=25)
    alone = [engine.complete([p], params)[0].text for p in PROMPTS]
    found: dict[int, str] = {}

    def work(i):
        found[i] = engine.complete([PROMPTS[i]], params)[0].text

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(len(PROMPTS))] == alone


def test_cancel_returns_what_there_is(engine, monkeypatch):
    slow_down(engine, monkeypatch)
    n_pieces = 0

    def stop_soon(number, text):
        nonlocal n_pieces
        n_pieces += 1
        if n_pieces == 3:
            engine.cancel()

    result = engine.complete([PROMPTS[0]], SamplingParams(max_tokens=60), on_text=stop_soon)[0]
    assert result.finish_reason == "cancelled"
    assert 0 < len(result.token_ids) < 60


def test_scores_are_the_log_probabilities_of_generation(engine, small_tokenizer):
    ids = small_tokenizer.encode(PROMPTS[2], bos=True)
    result = engine.complete([ids], SamplingParams(max_tokens=12, logprobs=True))[0]
    scores = engine.score([[*ids, *result.token_ids]])[0]
    assert scores[len(ids) - 1 :] == pytest.approx(list(result.logprobs), abs=1e-4)


def test_infill_stops_at_eot(engine, small_tokenizer):
    params = SamplingParams(max_tokens=30)
    result = engine.infill([("def f(x):\n    ", "\n    return y\n")], params)[0]
    prompt = small_tokenizer.encode_infilling("def f(x):\n    ", "\n    return y\n")
    stops = (small_tokenizer.eot_id,)
    ids, _ = greedy(engine._runner.model, small_tokenizer, prompt, 30, stops)
    assert list(result.token_ids) == ids


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"n": 0}, "n = 0"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"max_tokens": 2**40}, "max_tokens"),
        ({"seed": "a"}, "seed"),
        ({"stop": ("",)}, "stop"),
        ({"min_p": 1.1}, "min_p"),
        ({"presence_penalty": float("inf")}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": ((5, 101.0),)}, "logit_bias of 5 = 101"),
        ({"logit_bias": ((5, 1.0), (5, 2.0))}, "each token id once"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"schema": "[1]"}, "schema"),
    ],
)
def test_bad_parameters_are_named(changes, named):
    with pytest.raises(ValueError, match=named):
        SamplingParams(**changes)


def test_damaged_weights_are_reported(model, small_tokenizer):
    broken = Transformer(model.config)
    broken.load_state_dict(model.state_dict())
    broken.model.norm.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="not a number"):
        Engine.of(broken.requires_grad_(False), small_tokenizer).complete(["x"])


def test_int8_weights_generate(model, small_tokenizer, tmp_path):
    from codellama.model.checkpoint import save_checkpoint

    save_checkpoint(
        tmp_path / "m", model.config, model.state_dict(), write_more=small_tokenizer.save
    )
    params = SamplingParams(max_tokens=8)
    integers = Engine(tmp_path / "m", dtype="int8").complete(PROMPTS, params)
    halves = Engine(tmp_path / "m").complete(PROMPTS, params)
    n_same = sum(a.token_ids[0] == b.token_ids[0] for a, b in zip(integers, halves, strict=True))
    assert n_same >= 4


def test_cancelled_at_any_moment(engine, monkeypatch):
    """Nothing leaks and nobody else is disturbed, whenever it happens."""
    params = SamplingParams(max_tokens=25)
    expected = engine.complete(PROMPTS[:1], params)[0]
    slow_down(engine, monkeypatch, 0.001)
    ids = engine.tokenizer.encode(PROMPTS[2], bos=True)
    for n in range(30):
        victims = [submit(engine, [*ids, n]) for _ in range(4)]
        timer = threading.Timer(0.001 * n, engine._batcher.cancel, [victims])
        timer.start()
        assert engine.complete(PROMPTS[:1], params)[0] == expected
        timer.join()
        assert {sequence.finish_reason for sequence in victims} <= {"cancelled", "length"}
    assert is_empty(engine)


def test_a_damaged_request_fails_alone(engine, monkeypatch):
    """One whose logits are not numbers, and one whose caller's listener is gone."""
    expected = engine.complete(PROMPTS[1:3], SamplingParams(max_tokens=20))
    poison = engine.tokenizer.encode(PROMPTS[0], bos=True)
    logits = engine._runner.logits

    def poisoned(tokens, spans, wanted):
        out = logits(tokens, spans, wanted).clone()
        for row, at in enumerate(wanted):
            if tokens[at - 2 : at + 1] == poison[-3:]:
                out[row] = float("nan")
        return out

    monkeypatch.setattr(engine._runner, "logits", poisoned)
    results: dict[int, object] = {}

    def work(number, prompt):
        try:
            results[number] = engine.complete([prompt], SamplingParams(max_tokens=20))[0]
        except ValueError as error:
            results[number] = str(error)

    threads = [
        threading.Thread(target=work, args=(n, p)) for n, p in enumerate([poison, *PROMPTS[1:3]])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "not a number" in str(results[0])
    assert [results[1], results[2]] == expected
    assert is_empty(engine)


def test_after_a_failed_step_the_engine_goes_on(engine, monkeypatch):
    expected = engine.complete(PROMPTS, SamplingParams(max_tokens=9))
    run = engine._runner.run
    monkeypatch.setattr(engine._runner, "run", lambda plan: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.complete(PROMPTS, SamplingParams(max_tokens=9))
    assert is_empty(engine)
    monkeypatch.setattr(engine._runner, "run", run)
    assert engine.complete(PROMPTS, SamplingParams(max_tokens=9)) == expected


def test_many_streams_in_an_event_loop(engine, monkeypatch):
    """Concurrent streams, one of which is left and one of which is cancelled."""
    slow_down(engine, monkeypatch, 0.002)
    params = SamplingParams(max_tokens=25, logprobs=True, top_logprobs=3)
    alone = engine.complete(PROMPTS, params)
    ids = [engine.tokenizer.encode(p, bos=True) for p in PROMPTS]
    stops = (engine.tokenizer.eos_id,)

    async def collect(prompt):
        return [piece async for piece in engine.pieces(prompt, params, stops)]

    async def leave():
        async with aclosing(engine.pieces(ids[0], SamplingParams(80), stops)) as pieces:
            async for _ in pieces:
                return

    async def everything():
        doomed = asyncio.ensure_future(collect(ids[1]))
        kept = [asyncio.ensure_future(collect(prompt)) for prompt in ids]
        await asyncio.sleep(0.01)
        doomed.cancel()
        await leave()
        results = await asyncio.gather(*kept)
        with pytest.raises(asyncio.CancelledError):
            await doomed
        return results

    for prompt, pieces, expected in zip(ids, asyncio.run(everything()), alone, strict=True):
        assert "".join(piece.text for piece in pieces) == expected.text
        assert sum((piece.token_ids for piece in pieces), ()) == expected.token_ids
        assert sum((p.logprobs for p in pieces), ()) == pytest.approx(expected.logprobs, abs=1e-4)
        tops = sum((piece.top_logprobs for piece in pieces), ())
        assert [top[0][0] for top in tops] == list(expected.token_ids)
        assert [top[0][1] for top in tops] == pytest.approx(expected.logprobs, abs=1e-4)
        assert {len(top) for top in tops} == {3}
        reasons = [piece.finish_reason for piece in pieces]
        assert reasons == [None] * (len(pieces) - 1) + [expected.finish_reason]
        assert {piece.n_cached for piece in pieces} == {(len(prompt) - 1) // 16 * 16}
    assert is_empty(engine)


def test_death_of_the_thread_is_heard_by_all(engine, monkeypatch):
    """Those that run, those that wait, and those that come later."""
    slow_down(engine, monkeypatch, 0.01)

    async def ask(prompt):
        ids = engine.tokenizer.encode(prompt, bos=True)
        async for _ in engine.pieces(ids, SamplingParams(80), ()):
            monkeypatch.setattr(engine._scheduler, "schedule", lambda: 1 / 0)
            monkeypatch.setattr(engine._scheduler, "remove", lambda job: 1 / 0)

    async def everything():
        return await asyncio.gather(*map(ask, PROMPTS), return_exceptions=True)

    results = asyncio.run(everything())
    assert [type(result) for result in results] == [RuntimeError] * len(PROMPTS)
    assert "ZeroDivisionError" in engine.failure
    with pytest.raises(RuntimeError, match="the engine has stopped: ZeroDivisionError"):
        engine.complete(["x"])


def test_slow_callers_lose_nothing(engine):
    """News that were read with earlier ones must not count as another end."""
    params = SamplingParams(max_tokens=8)
    expected = engine.complete(PROMPTS, params)
    assert engine.complete(PROMPTS, params, on_text=lambda *_: time.sleep(0.02)) == expected


def test_stop_string_that_begins_another(engine):
    free = engine.complete([PROMPTS[0]], SamplingParams(max_tokens=40))[0].text
    long, short = free[10:18], free[10:13]
    for stop in ((long, short), (short, long), (long + "never", short)):
        result = engine.complete([PROMPTS[0]], SamplingParams(max_tokens=40, stop=stop))[0]
        assert (result.text, result.finish_reason) == (free[: free.index(short)], "stop")


def test_ten_thousand_queued_requests(engine):
    """Queued and cancelled without a step for each."""
    ids = engine.tokenizer.encode(PROMPTS[0], bos=True)
    sequences = [submit(engine, ids) for _ in range(10_000)]
    engine.cancel()
    assert {sequence.finish_reason for sequence in sequences} <= {"cancelled", "length"}
    assert is_empty(engine)
