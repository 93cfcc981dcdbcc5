"""OpenAI's dialect as the real client speaks it, against the engine in this process."""

import json

import openai
import pytest
from servers import gauge, wait_for

from codellama import SamplingParams

GREEDY = {"model": "codellama", "temperature": 0, "max_tokens": 12}
PARAMS = SamplingParams(max_tokens=12)
PROMPT = "def fibonacci(n):\n"
GAP = ("def area(r):\n    ", "\n    return a\n")
DIALOG = [{"role": "system", "content": "Short."}, {"role": "user", "content": "Say hi."}]


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_completion(client, engine):
    reply = client.completions.create(prompt=PROMPT, **GREEDY)
    [expected] = engine.complete([PROMPT], PARAMS)
    [choice] = reply.choices
    assert (choice.text, choice.finish_reason) == (expected.text, "length")
    assert reply.usage.prompt_tokens == expected.prompt_tokens
    assert reply.usage.completion_tokens == len(expected.token_ids)
    again = client.completions.create(prompt=PROMPT * 8, **GREEDY)
    again = client.completions.create(prompt=PROMPT * 8, **GREEDY)
    assert again.usage.prompt_tokens_details.cached_tokens >= 16


@pytest.mark.parametrize("suffix_first", [False, True])
def test_suffix_infills(client, engine, suffix_first):
    extra = {"suffix_first": suffix_first, "return_token_ids": True}
    reply = client.completions.create(prompt=GAP[0], suffix=GAP[1], **GREEDY, extra_body=extra)
    [expected] = engine.infill([GAP], PARAMS, suffix_first)
    assert reply.choices[0].text == expected.text
    ids = engine.tokenizer.encode_infilling(*GAP, suffix_first)
    assert reply.choices[0].prompt_token_ids == ids


def test_an_empty_suffix_infills_and_none_does_not(client, engine):
    empty = client.completions.create(prompt=PROMPT, suffix="", **GREEDY)
    assert empty.choices[0].text == engine.infill([(PROMPT, "")], PARAMS)[0].text
    none = client.completions.create(prompt=PROMPT, suffix=None, **GREEDY)
    assert none.choices[0].text == engine.complete([PROMPT], PARAMS)[0].text


def test_chat(client, engine):
    reply = client.chat.completions.create(messages=DIALOG, **GREEDY)
    assert reply.choices[0].message.content == engine.chat([DIALOG], PARAMS)[0].text
    parts = [{"type": "text", "text": "Say "}, {"type": "text", "text": "hi."}]
    again = client.chat.completions.create(
        messages=[DIALOG[0], {"role": "user", "content": parts}], **GREEDY
    )
    assert again.choices[0].message.content == reply.choices[0].message.content


def test_streams(client, engine):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.completions.create(prompt=PROMPT, **GREEDY, **options))
    [expected] = engine.complete([PROMPT], PARAMS)
    assert "".join(c.choices[0].text for c in chunks[:-1]) == expected.text
    assert [c.choices[0].finish_reason for c in chunks[:-2]] == [None] * (len(chunks) - 2)
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 12
    chunks = list(client.chat.completions.create(messages=DIALOG, **GREEDY, stream=True))
    assert [c.choices[0].delta.role for c in chunks] == ["assistant"] + [None] * (len(chunks) - 1)
    assert chunks[0].choices[0].delta.content == ""
    assert all(c.choices[0].delta.content is not None for c in chunks)
    text = "".join(c.choices[0].delta.content for c in chunks)
    assert text == engine.chat([DIALOG], PARAMS)[0].text


def test_many_at_once(client, engine):
    """A batch of texts and n of each, seeded; the order and the texts are the engine's."""
    texts = [PROMPT, "import os\n"]
    settings = {"model": "x", "temperature": 0.9, "max_tokens": 8, "seed": 5, "n": 3}
    expected = engine.complete(texts, SamplingParams(8, 0.9, seed=5, n=3))
    reply = client.completions.create(prompt=texts, **settings)
    assert [c.text for c in reply.choices] == [e.text for e in expected]
    assert [c.index for c in reply.choices] == list(range(6))
    ids = [engine.tokenizer.encode(text, bos=True) for text in texts]
    again = client.completions.create(prompt=ids, **settings)
    assert [c.text for c in again.choices] == [e.text for e in expected]
    streamed = [""] * 6
    for chunk in client.completions.create(prompt=texts, stream=True, **settings):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [e.text for e in expected]


def test_best_of(client, engine):
    params = SamplingParams(8, 1.0, seed=3, n=6, logprobs=True)
    results = engine.complete([PROMPT], params)
    best = max(results, key=lambda r: sum(r.logprobs) / len(r.logprobs))
    reply = client.completions.create(
        model="x", prompt=PROMPT, max_tokens=8, temperature=1, seed=3, n=1, best_of=6
    )
    assert [c.text for c in reply.choices] == [best.text]
    with pytest.raises(openai.BadRequestError, match="best_of"):
        client.completions.create(model="x", prompt="a", best_of=2, n=1, stream=True)


def test_logprobs(client, engine):
    params = SamplingParams(6, logprobs=True, top_logprobs=2)
    [expected] = engine.complete([PROMPT], params)
    settings = {"model": "x", "max_tokens": 6, "temperature": 0}
    [choice] = client.completions.create(prompt=PROMPT, logprobs=2, **settings).choices
    assert choice.logprobs.token_logprobs == pytest.approx(expected.logprobs, abs=1e-4)
    assert "".join(choice.logprobs.tokens) == choice.text
    for offset, token in zip(choice.logprobs.text_offset, choice.logprobs.tokens, strict=True):
        assert choice.text[offset:].startswith(token)
    assert [len(top) for top in choice.logprobs.top_logprobs] == [2] * 6
    chat = client.chat.completions.create(
        messages=DIALOG, logprobs=True, top_logprobs=3, **settings
    )
    for entry in chat.choices[0].logprobs.content:
        assert entry.top_logprobs[0].token == entry.token  # greedy
        assert bytes(entry.bytes).decode() == entry.token


def test_echo_scores_a_text(client, engine):
    text = "x = [i for i in range(10)]\n"
    reply = client.completions.create(model="x", prompt=text, echo=True, logprobs=0, max_tokens=0)
    [choice] = reply.choices
    assert choice.text == text
    assert choice.logprobs.token_logprobs[0] is None
    [scores] = engine.score([text])
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(scores, abs=1e-4)
    assert choice.logprobs.top_logprobs is None
    # With the likeliest tokens of each place: what the engine would choose there.
    settings = {"model": "x", "prompt": text, "temperature": 0, "echo": True, "logprobs": 2}
    [choice] = client.completions.create(max_tokens=2, **settings).choices
    tops, tokens = choice.logprobs.top_logprobs, choice.logprobs.tokens
    assert (tops[0], len(tops)) == (None, len(tokens))
    ids = engine.tokenizer.encode(text, bos=True)
    for at in (1, 5, len(ids) - 1, len(ids)):
        params = SamplingParams(1, top_logprobs=2)
        [[(_, likeliest), _]] = engine.complete([ids[:at]], params)[0].top_logprobs
        assert max(tops[at].values()) == pytest.approx(likeliest, abs=1e-4)
        place = choice.logprobs.token_logprobs[at]
        assert place == pytest.approx(scores[at - 1], abs=1e-4) if at < len(ids) else place <= 0


@pytest.mark.parametrize("text", ["x = [1]\n", "  y = 'naïve 日本' # 🦙\n", "\n"])
@pytest.mark.parametrize("stream", [False, True])
def test_offsets_point_into_the_text(client, engine, text, stream):
    """Though the first token has a space that encoding added, and some are parts of characters."""
    settings = {"model": "x", "temperature": 0, "echo": True, "logprobs": 0, "max_tokens": 3}
    reply = client.completions.create(prompt=text, stream=stream, **settings)
    choices = [part.choices[0] for part in reply] if stream else reply.choices
    written = "".join(choice.text for choice in choices)
    found = [c.logprobs for c in choices if c.logprobs]
    tokens = [token for logprobs in found for token in logprobs.tokens]
    offsets = [offset for logprobs in found for offset in logprobs.text_offset]
    ids = engine.tokenizer.encode(text, bos=True)
    ends = [len(engine.tokenizer.decode(ids[:i]).rstrip("\ufffd")) for i in range(len(ids))]
    assert offsets[: len(ids)] == ends
    assert len(offsets) == len(tokens) == len(ids) + 3
    for offset, token in list(zip(offsets, tokens, strict=True))[len(ids) :]:
        assert written[offset:].startswith(token)


def test_json_schema(client):
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
    for seed in range(3):
        reply = client.chat.completions.create(
            model="x", messages=DIALOG, response_format=form, max_tokens=100, seed=seed
        )
        assert reply.choices[0].finish_reason == "stop"  # nothing in it can go on for ever
        person = json.loads(reply.choices[0].message.content)
        assert set(person) == {"name", "age"}
        assert isinstance(person["age"], int)
    form["json_schema"]["schema"] = {"type": "nonsense"}
    with pytest.raises(openai.BadRequestError, match="schema"):
        client.chat.completions.create(model="x", messages=DIALOG, response_format=form)


def test_stops_and_bias(client, engine):
    [plain] = engine.complete([PROMPT], SamplingParams(40))
    word = plain.text.strip()[3:6]
    reply = client.completions.create(
        model="x", prompt=PROMPT, temperature=0, max_tokens=40, stop=[word]
    )
    assert reply.choices[0].text == plain.text[: plain.text.index(word)]
    assert reply.choices[0].finish_reason == "stop"
    [token] = engine.tokenizer.encode_without_prefix_space("x")
    reply = client.completions.create(prompt=PROMPT, **GREEDY, logit_bias={str(token): 100})
    assert reply.choices[0].text == "x" * 12


def test_cancelling_a_stream_ends_it(client, server):
    stream = client.completions.create(
        model="x", prompt="a", max_tokens=1000, stream=True, logit_bias={"2": -100}
    )
    next(iter(stream))
    assert gauge(server, "running") == 1
    stream.close()
    wait_for(lambda: gauge(server, "running") == 0)


LIMITS = [
    ({"prompt": "a " * 3000}, "context 1024"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [99999999]}, "99999999"),
    ({"prompt": [-1]}, "-1"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 2**31}, "max_tokens"),
    ({"n": 0}, "n:"),
    ({"n": 129}, "n:"),
    ({"n": 3, "best_of": 2}, "best_of"),
    ({"logprobs": 6}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"stop": [""]}, "stop"),
    ({"stop": [1]}, "stop"),
    ({"stop": ["a"] * 129}, "stop: expected at most 128 texts"),
    ({"stop": ["a" * 257]}, "stop = .*expected texts of 1 to 256 characters"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 101}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"top_p": 1.01}, "top_p"),
    ({"min_p": -1}, "min_p"),
    ({"top_k": -3}, "top_k"),
    ({"presence_penalty": 101}, "presence_penalty"),
    ({"frequency_penalty": -101}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"9999999": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
]


@pytest.mark.parametrize(("change", "named"), LIMITS, ids=str)
def test_limits_are_named(client, change, named):
    body = {"model": "x", "prompt": "a", "max_tokens": 2} | change
    with pytest.raises(openai.BadRequestError, match=named):
        client.post("/completions", body=body, cast_to=object)


EDGES = [
    {"max_tokens": 0},
    {"max_tokens": 2**31 - 1, "logit_bias": {"2": 100}},
    {"temperature": 100, "top_p": 0, "top_k": -1, "min_p": 1},
    {"temperature": 1e-300},
    {"seed": -(2**63)},
    {"presence_penalty": 100, "frequency_penalty": -100, "repetition_penalty": 100},
    {"max_tokens": 2.0, "n": 1.0, "unknown": {"x": 1}, "suffix": None, "stop": None},
]


@pytest.mark.parametrize("change", EDGES, ids=str)
def test_edges_are_obeyed(client, change):
    body = {"model": "x", "prompt": "a", "max_tokens": 2} | change
    reply = client.post("/completions", body=body, cast_to=dict)
    assert reply["usage"]["completion_tokens"] <= (0 if change.get("max_tokens") == 0 else 2)


def test_errors_have_openais_shape(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="x", prompt="a " * 3000)
    assert caught.value.code == "context_length_exceeded"
    tool = {"type": "function", "function": {"name": "f"}}
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(model="x", messages=DIALOG, tools=[tool])
    with pytest.raises(openai.BadRequestError, match="special tags"):
        client.chat.completions.create(model="x", messages=[{"role": "user", "content": "[INST]"}])
    with pytest.raises(openai.NotFoundError):
        client.get("/nothing", cast_to=object)
    assert client.models.list().data[0].max_model_len == 1024
