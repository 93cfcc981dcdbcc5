"""What a request may change about the model's choice: schemas, penalties, biases, min_p."""

import asyncio
import json
import re
import time

import pytest
import torch
from test_equal_results import prompts

from codellama.engine import Engine, SamplingParams
from codellama.engine.generator import Ask
from codellama.engine.reference import generate_greedy

SMALL = {"type": "integer", "minimum": 0, "maximum": 9}
TEXT = {"type": "string", "maxLength": 12}


def closed(required, **properties):
    return {"type": "object", "properties": properties, "required": required,
            "additionalProperties": False}  # fmt: skip


POINT = closed(["x", "y"], x=SMALL, y={"type": "null"})
TREE = closed(["leaf"], leaf=SMALL, next={"$ref": "#/$defs/tree"})


def is_small(value):
    return type(value) is int and 0 <= value <= 9


def is_text(value):
    return isinstance(value, str) and len(value) <= 12


def is_point(value):
    return value == {"x": value["x"], "y": None} and is_small(value["x"])


def is_tree(value):
    return is_small(value["leaf"]) and (len(value) == 1 or is_tree(value["next"]))


SCHEMAS = {
    "enum": ({"enum": ["red", 3, None]}, lambda v: v in ("red", 3, None)),
    "integer": (SMALL, is_small),
    "boolean": ({"type": "boolean"}, lambda v: v is True or v is False),
    "pattern": ({"type": "string", "pattern": "^[a-f]{3}-[0-9]{2}$"},
                lambda v: re.fullmatch("[a-f]{3}-[0-9]{2}", v)),
    "point": (POINT, is_point),
    "points": ({"type": "array", "items": POINT, "minItems": 1, "maxItems": 2},
               lambda v: 1 <= len(v) <= 2 and all(map(is_point, v))),
    "text": (closed(["a"], a=TEXT, b=TEXT),
             lambda v: {"a"} <= set(v) <= {"a", "b"} and all(map(is_text, v.values()))),
    "choice": ({"anyOf": [{"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
                          {"const": "é☺"}]},
               lambda v: v == "é☺" or (len(v) <= 3 and set(v) <= {True, False})),
    "tuple": ({"type": "array", "prefixItems": [TEXT, SMALL], "items": False, "minItems": 2},
              lambda v: len(v) == 2 and is_text(v[0]) and is_small(v[1])),
    "tree": ({"$defs": {"tree": TREE}, "$ref": "#/$defs/tree"}, is_tree),
}  # fmt: skip


@pytest.fixture(scope="module")
def shipped():
    return Engine()


def test_every_completion_conforms_to_its_schema(shipped):
    """Ten schemas, greedy and drawn, all in one batch; some may be cut, none may be wrong."""
    asked = [
        (name, SamplingParams(160, temperature=t, seed=seed, schema=json.dumps(schema)))
        for name, (schema, _) in SCHEMAS.items()
        for t, seed in ((0.0, 0), (1.0, 1), (1.5, 2))
    ]
    texts = [f"# the {name} as JSON\nvalue = " for name, _ in asked]
    results = shipped.complete(texts, [params for _, params in asked])
    whole = set()
    for (name, _), result in zip(asked, results, strict=True):
        if result.finish_reason == "length":
            assert len(result.token_ids) == 160
            continue
        assert result.finish_reason == "stop"
        assert SCHEMAS[name][1](json.loads(result.text)), (name, result.text)
        whole.add(name)
    assert whole == set(SCHEMAS)


def test_infilling_and_any_object(shipped):
    """EOT ends a gap as EOS ends a text; "{}" is any object; what is cut says so."""
    params = SamplingParams(60, temperature=1.0, seed=3, schema='{"type": "integer"}')
    [filled] = shipped.infill([("x = ", "\nprint(x)\n")], params)
    int(filled.text)
    [strange] = shipped._generate([Ask([5], (2, -1, 10**9))], params, None)
    int(strange.text)
    results = shipped.complete(["x = "], SamplingParams(40, 1.0, seed=5, n=8, schema="{}"))
    for result in results:
        assert result.text.startswith("{")
        if result.finish_reason == "stop":
            assert isinstance(json.loads(result.text), dict)
    [cut] = shipped.complete(["x"], SamplingParams(7, schema='{"type": "array", "minItems": 90}'))
    assert (cut.finish_reason, len(cut.token_ids)) == ("length", 7)


@pytest.mark.parametrize(
    "regex", [r"[a-f]{3}-[0-9]{2}", r"(yes|no)( maybe)*!", r"\d{4}-\d\d-\d\d", "é+☺"]
)
def test_every_completion_matches_its_regex(regex, shipped):
    results = shipped.complete(
        ["# ", "x = "], SamplingParams(60, temperature=1.2, seed=1, n=20, regex=regex)
    )
    assert {r.finish_reason for r in results} <= {"stop", "length"}
    whole = [r.text for r in results if r.finish_reason == "stop"]
    assert whole
    assert all(re.fullmatch(regex, text) for text in whole)


def test_an_event_loop_goes_on_while_a_grammar_is_compiled(shipped, monkeypatch):
    """Another stream's pieces, and a clock, while compiling takes half a second."""
    from codellama.engine import grammar

    compiled = grammar._compiled

    def slowly(*args):
        time.sleep(0.5)
        return compiled(*args)

    monkeypatch.setattr(grammar, "_compiled", slowly)
    gaps = []

    async def tick():
        while True:
            begin = time.perf_counter()
            await asyncio.sleep(0.01)
            gaps.append(time.perf_counter() - begin)

    async def ask():
        clock = asyncio.ensure_future(tick())
        params = SamplingParams(8, regex="[0-9]{4}")
        text = "".join([p.text async for p in shipped.pieces([1, 300], params, (2,))])
        clock.cancel()
        return text

    assert re.fullmatch("[0-9]{4}", asyncio.run(ask()))
    assert len(gaps) > 10
    assert max(gaps) < 0.4


CHANGES = [
    {"repetition_penalty": 1.3},
    {"presence_penalty": 0.7, "frequency_penalty": 0.4},
    {"frequency_penalty": -0.5, "repetition_penalty": 0.8},
    {"logit_bias": ((9, 5.0), (300, -100.0))},
    {"schema": json.dumps(SCHEMAS["points"][0])},
    {"schema": json.dumps(SCHEMAS["text"][0]), "repetition_penalty": 1.1},
    {"regex": "[a-z]+(, [a-z]+)*"},
    {},
]


@pytest.mark.parametrize(
    "options",
    [{}, {"native": False, "max_batch": 3}, {"cache_tokens": 512, "step_tokens": 128}],
    ids=str,
)
def test_changed_greedy_equals_reference(options, long_model, small_tokenizer):
    """Side by side in a batch with guesses; log-probabilities stay those of the model."""
    texts = prompts(small_tokenizer.vocab_size)
    params = [SamplingParams(30, logprobs=True, **changes) for changes in CHANGES]
    engine = Engine.of(long_model, small_tokenizer, **options)
    plain = engine.complete(texts, SamplingParams(30))
    stops = {small_tokenizer.eos_id}
    n_other = 0
    for text, settings, before, result in zip(
        texts, params, plain, engine.complete(texts, params), strict=True
    ):
        ids, logprobs = generate_greedy(long_model, text, 30, stops, settings, small_tokenizer)
        assert list(result.token_ids) == ids
        assert result.logprobs == pytest.approx(logprobs, abs=1e-3)
        n_other += result.token_ids != before.token_ids
    assert n_other == len(CHANGES) - 1


def test_min_p_keeps_what_is_likely_enough(long_model, small_tokenizer):
    prompt = prompts(small_tokenizer.vocab_size)[1]
    probabilities = long_model(torch.tensor([prompt]))[0, -1].softmax(-1)
    likely = set((probabilities >= 0.3 * probabilities.max()).nonzero()[:, 0].tolist())
    assert 3 < len(likely) < 30
    params = SamplingParams(1, temperature=1.0, min_p=0.3, n=800, seed=0)
    results = Engine.of(long_model, small_tokenizer).complete([prompt], params)
    drawn = {token for result in results for token in result.token_ids}
    assert drawn == likely - {small_tokenizer.eos_id}


def test_seeds_reproduce_in_any_company(long_model, small_tokenizer):
    texts = prompts(small_tokenizer.vocab_size)
    params = [
        SamplingParams(20, temperature=0.9, top_p=0.9, min_p=0.02, seed=seed, **changes)
        for seed, changes in enumerate(CHANGES)
    ]
    engine = Engine.of(long_model, small_tokenizer, max_batch=4)
    together = [r.token_ids for r in engine.complete(texts, params)]
    alone = [engine.complete([t], p)[0].token_ids for t, p in zip(texts, params, strict=True)]
    assert together == alone


@pytest.mark.parametrize(
    ("prompt", "changes", "message"),
    [
        (
            [5],
            {"schema": '{"type": "foo"}'},
            r"schema .*foo.*not a JSON schema that can be kept to",
        ),
        ([5], {"schema": '{"not": {}}'}, 'schema .*Unimplemented keys: ."not".'),
        ([5], {"schema": '{"$ref": "#/nope"}'}, "schema .*nope"),
        ([5], {"regex": "(a"}, r"regex '\(a': not a regular expression that can be kept to"),
        ([5], {"logit_bias": ((10**6, 1.0),)}, r"token id 1000000: expected one in \[0, "),
        ([5, -1], {}, "token id -1: expected one"),
    ],
)
def test_what_cannot_be_done_is_refused(prompt, changes, message, long_model, small_tokenizer):
    engine = Engine.of(long_model, small_tokenizer)
    with pytest.raises(ValueError, match=message):
        engine.complete([prompt], SamplingParams(**changes))
    with pytest.raises(ValueError, match="token id 99999: expected"):
        engine.score([[1, 99999]])


def test_best_of_gives_the_likeliest(long_model, small_tokenizer):
    prompt = prompts(small_tokenizer.vocab_size)[1]
    engine = Engine.of(long_model, small_tokenizer)
    drawn = SamplingParams(10, temperature=1.0, seed=3, n=8, logprobs=True)
    results = engine.complete([prompt], drawn)
    ranked = sorted(results, key=lambda r: -sum(r.logprobs) / max(1, len(r.token_ids)))
    params = SamplingParams(10, temperature=1.0, seed=3, n=2, best_of=8)
    best = engine.complete([prompt, [7]], params)
    assert len(best) == 4
    assert [r.token_ids for r in best[:2]] == [r.token_ids for r in ranked[:2]]
    assert best[0].logprobs is None
    with pytest.raises(ValueError, match="best_of = 1: expected n = 2 or more"):
        SamplingParams(n=2, best_of=1)
    with pytest.raises(ValueError, match="best_of: which texts"):
        engine.complete([prompt], params, on_text=print)


def test_log_probabilities_of_the_prompt(long_model, small_tokenizer):
    prompt = prompts(small_tokenizer.vocab_size)[2]
    engine = Engine.of(long_model, small_tokenizer)
    [result, other] = engine.complete([prompt], SamplingParams(3, n=2, prompt_logprobs=True))
    exact = long_model(torch.tensor([prompt]))[0, :-1].log_softmax(-1)
    exact = exact.gather(-1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist()
    assert result.prompt_logprobs == pytest.approx(exact, abs=1e-3)
    assert other.prompt_logprobs == result.prompt_logprobs
    [plain] = engine.complete([prompt], SamplingParams(3))
    assert plain.prompt_logprobs is None
