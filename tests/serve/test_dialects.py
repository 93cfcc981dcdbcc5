"""The dialects beside OpenAI's: ollama's own client, and the shapes that editors send."""

import httpx
import ollama
import pytest
from servers import in_thread

from any_weights import random_model, small_vocabulary
from codellama import Engine, SamplingParams
from codellama.engine import Piece
from codellama.serve import Limits
from codellama.tokenizer import Tokenizer
from codellama.tokenizer.chat import TAGS
from codellama.tokenizer.variants import INFILLING_PIECES

GAP = ("def area(r):\n    ", "\n    return a\n")
N_TOKENS = 5  # before the model ends the gap by itself
PARAMS = SamplingParams(max_tokens=N_TOKENS)
GREEDY = {"num_predict": N_TOKENS, "temperature": 0}


@pytest.fixture(scope="module")
def expected(engine):
    return engine.infill([GAP], PARAMS)[0].text


@pytest.fixture(scope="module")
def client(server):
    return ollama.Client(host=server)


def test_ollama_generate(client, engine, expected):
    reply = client.generate("codellama", GAP[0], suffix=GAP[1], options=GREEDY)
    assert reply.response == expected
    assert (reply.done, reply.done_reason, reply.eval_count) == (True, "length", N_TOKENS)
    parts = list(client.generate("codellama", GAP[0], suffix=GAP[1], options=GREEDY, stream=True))
    assert "".join(part.response for part in parts) == expected
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    raw = f"<PRE> {GAP[0]} <SUF>{GAP[1]} <MID>"
    assert client.generate("codellama", raw, raw=True, options=GREEDY).response == expected
    plain = client.generate("codellama", GAP[0], options=GREEDY)
    assert plain.response == engine.complete([GAP[0]], PARAMS)[0].text


def test_ollama_chat_show_list(client, engine):
    messages = [{"role": "user", "content": "Say hi."}]
    reply = client.chat("codellama", messages, options=GREEDY)
    assert reply.message.content == engine.chat([messages], PARAMS)[0].text
    assert ".Suffix" in client.show("codellama").template
    assert client.list().models[0].model == "codellama:latest"
    assert client.generate("codellama").done_reason == "load"
    with pytest.raises(ollama.ResponseError, match="special tags"):
        client.chat("codellama", [{"role": "user", "content": "<<SYS>>"}])


def test_mistral(post, server, expected):
    body = {"prompt": GAP[0], "suffix": GAP[1], "max_tokens": N_TOKENS, "temperature": 0}
    assert post("/v1/fim/completions", **body)["choices"][0]["message"]["content"] == expected
    with httpx.stream("POST", f"{server}/v1/fim/completions", json=body | {"stream": True}) as r:
        lines = [line.removeprefix("data: ") for line in r.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    deltas = [httpx.Response(200, text=line).json()["choices"][0] for line in lines]
    assert "".join(delta["delta"]["content"] for delta in deltas) == expected
    assert deltas[-1]["finish_reason"] == "length"


def test_tabby_health(server):
    found = httpx.get(f"{server}/v1/health").json()
    assert found["version"]["git_describe"]  # its plugins fail without
    assert found["model"]


def test_tabby(post, engine):
    snippet = {"filepath": "lib/shapes.ts", "body": "const PI = 3;", "score": 1.0}
    segments = {"prefix": GAP[0], "suffix": GAP[1], "declarations": [snippet], "clipboard": "x"}
    reply = post(
        "/v1/completions",
        language="python",
        segments=segments,
        debug_options={"return_prompt": True},
    )
    assert isinstance(reply["choices"][0]["text"], str)
    heading = "// lib/shapes.ts\nconst PI = 3;\n\n"
    assert reply["debug_data"]["prompt"] == heading + GAP[0] + GAP[1]
    plain = post("/v1/completions", segments={"prefix": GAP[0], "suffix": GAP[1]})
    [same] = engine.infill([GAP], SamplingParams(max_tokens=64))
    assert same.text.startswith(plain["choices"][0]["text"])


def infill(**more):
    return {"input_prefix": "def area(r):\n", "prompt": "    ", "input_suffix": GAP[1]} | more


def test_infill(post, engine, expected):
    reply = post("/infill", **infill(n_predict=N_TOKENS))
    assert expected.startswith(reply["content"])
    assert (reply["stop"], reply["stop_type"], reply["truncated"]) == (True, "limit", False)
    assert reply["timings"]["predicted_n"] == N_TOKENS
    extra = [{"filename": "a/b.py", "text": "A = 1", "time": 0}, {"text": "B = 2"}]
    reply = post("/infill", **infill(input_extra=extra, n_predict=1))
    assert reply["prompt"] == "# a/b.py\nA = 1\n\n# snippet\nB = 2\n\n" + "".join(GAP)


def test_cross_file_context_is_written_as_training_wrote_it():
    from codellama.data.languages import language_of
    from codellama.data.repository import _COMMENTS
    from codellama.serve.prompts import _comment as serving

    endings = "py c h cc cpp cs java js mjs jsx ts tsx go rs swift kt scala php dart zig cu groovy "
    endings += (
        "rb sh sql lua md html vue xml m sol proto toml d hs elm clj el scm tex erl css scss "
    )
    endings += "less svelte svg ll asm vhd adb ads wgsl glsl typ yaml r jl pl ex nim cmake"
    wrong = {}
    for ending in endings.split():
        path = f"src/x.{ending}"
        if language := language_of(path):
            expected = _COMMENTS.get(language, "# {}").format(path)
            if serving(path) != expected:
                wrong[ending] = (language, expected)
    assert not wrong


def test_infill_as_llama_vim_sends_it(post, server):
    """Several results are an array; paths of response_fields stay names."""
    fields = ["content", "timings/prompt_n", "timings/nothing", "truncated"]
    editor = {
        "samplers": ["top_k", "top_p", "infill"],
        "id_slot": 0,
        "top_k": 40,
        "top_p": 0.9,
        "cache_prompt": True,
        "t_max_prompt_ms": 500,
        "t_max_predict_ms": 250,
    }
    replies = post("/infill", **infill(**editor, n_predict=8, n_cmpl=3, response_fields=fields))
    assert [set(reply) for reply in replies] == [{"content", "timings/prompt_n", "truncated"}] * 3
    reply = post("/infill", **infill(**editor, n_predict=8, response_fields=fields))
    assert isinstance(reply["content"], str)


def test_a_warm_up_fills_the_cache(post):
    prefix = "".join(f"warm_{i} = {i}\n" for i in range(40))
    warm = post("/infill", **infill(input_prefix=prefix, n_predict=0, response_fields=[""]))
    assert warm == {}
    reply = post("/infill", **infill(input_prefix=prefix, n_predict=1))
    assert reply["timings"]["cache_n"] >= reply["tokens_evaluated"] - 16
    assert post("/infill", **infill(n_predict=0))["content"] == ""


def test_what_does_not_fit_is_left_out_and_said(post, engine):
    lines = [f"value_{i} = {i}\n" for i in range(2000)]
    extra = [{"filename": "x.py", "text": "X = 1\n" * 900}]
    settings = {"input_suffix": "".join(lines), "input_extra": extra, "n_predict": 8}
    first = post("/infill", **infill(input_prefix="".join(lines), **settings))
    assert first["truncated"]
    assert first["tokens_evaluated"] + 8 <= 1024
    assert "value_1999 = 1999\n    value_0 = 0\n" in first["prompt"]
    assert "X = 1" not in first["prompt"]
    many = [{"filename": "y.py", "text": f"Y = {i}"} for i in range(20_000)]
    short = {"input_prefix": "", "input_suffix": "", "n_predict": 8}
    reply = post("/infill", **infill(**short | {"input_extra": many}))
    assert reply["prompt"].endswith("Y = 19998\n\n# y.py\nY = 19999\n\n    ")
    assert 900 < reply["tokens_evaluated"] <= 1016
    # The next keystroke finds what stands before it.
    more = post("/infill", **infill(input_prefix="".join(lines), **settings, prompt="    ab"))
    assert more["timings"]["cache_n"] > 400


def test_completion_of_llama_cpp(post, server, engine):
    prompt = "def fibonacci(n):\n"
    [expected] = engine.complete([prompt], SamplingParams(max_tokens=12))
    body = {"prompt": prompt, "n_predict": 12, "temperature": 0}
    assert post("/completion", **body)["content"] == expected.text
    with httpx.stream("POST", f"{server}/completion", json=body | {"stream": True}) as reply:
        chunks = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    chunks = [httpx.Response(200, text=chunk).json() for chunk in chunks]
    assert "".join(chunk["content"] for chunk in chunks) == expected.text
    assert [chunk["stop"] for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    word = expected.text[4:7]
    stopped = post("/completion", **body, stop=[word])
    assert (stopped["stop_type"], stopped["stopping_word"]) == ("word", word)
    assert stopped["content"] == expected.text[: expected.text.index(word)]
    ended = post("/completion", **body, logit_bias=[[2, 100]])
    assert (ended["stop_type"], ended["content"]) == ("eos", "")


def test_ends_that_the_operator_chose(engine, monkeypatch):
    """For infilling in every dialect, though its body does not ask; never for a completion."""
    written = f"<PRE> {GAP[0]} <SUF>{GAP[1]} <MID>"
    gap = {"prompt": GAP[0], "suffix": GAP[1]}
    segments = {"prefix": GAP[0], "suffix": GAP[1]}
    asked = [
        ("/v1/completions", gap, lambda r: r["choices"][0]["text"]),
        ("/v1/completions", {"prompt": written}, lambda r: r["choices"][0]["text"]),
        ("/v1/completions", {"segments": segments}, lambda r: r["choices"][0]["text"]),
        ("/v1/fim/completions", gap, lambda r: r["choices"][0]["message"]["content"]),
        ("/infill", infill(), lambda r: r["content"]),
        ("/completion", {"prompt": written}, lambda r: r["content"]),
        ("/api/generate", gap | {"stream": False}, lambda r: r["response"]),
        ("/api/generate", {"prompt": written, "stream": False}, lambda r: r["response"]),
    ]

    async def pieces(ids, params, stop_ids, whole=False):
        yield Piece(text[:3], (5,), (), (), None, 0)
        yield Piece(text[3:], (5,), (), (), "length", 0)

    monkeypatch.setattr(engine, "pieces", pieces)
    for option, text, expected in (
        ("trim_suffix", "a = 3\n    return a\n", "a = 3\n    "),
        ("end_at_line", "a = 3\n    re", "a = 3\n"),
    ):
        with in_thread(engine, Limits(**{option: True})) as (url, _):
            for path, body, read in asked:
                reply = httpx.post(url + path, json=body)
                assert read(reply.json()) == expected, (option, path)
            reply = httpx.post(f"{url}/v1/completions", json={"prompt": GAP[0]})
            assert reply.json()["choices"][0]["text"] == text


def test_a_model_that_does_not_infill():
    """Each dialect says so in its own shape; what needs no gap works."""
    engine = Engine.of(random_model(), Tokenizer(small_vocabulary().file, None, infilling=False))
    with in_thread(engine) as (url, _):

        def error(path, status, **body):
            reply = httpx.post(url + path, json=body)
            assert reply.status_code == status
            return reply.json()["error"]

        assert error("/v1/completions", 400, prompt="a", suffix="b")["code"] == "fim_not_supported"
        assert error("/v1/fim/completions", 400, prompt="a")["code"] == "fim_not_supported"
        assert error("/infill", 501, **infill())["code"] == "fim_not_supported"
        assert error("/v1/completions", 501, segments={"prefix": "a"})["code"] == (
            "fim_not_supported"
        )
        assert "does not support insert" in error("/api/generate", 400, prompt="a", suffix="b")
        assert "insert" not in httpx.post(f"{url}/api/show", json={}).json()["capabilities"]
        body = {"prompt": "<PRE> a <SUF>b <MID>", "max_tokens": 1, "return_token_ids": True}
        reply = httpx.post(f"{url}/v1/completions", json=body).json()
        ids = engine.tokenizer.encode(body["prompt"], bos=True)
        assert reply["choices"][0]["prompt_token_ids"] == ids


def test_names_of_metrics(server):
    """Dashboards are written against them."""
    text = httpx.get(f"{server}/metrics").text
    found = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE ")}
    names = "cache_use cancelled_total generated_tokens_total cached_tokens_total running waiting "
    names += "prompt_tokens_total requests_total first_token_seconds tokens_per_second"
    assert {f"codellama_{name}" for name in names.split()} <= found
    assert 'codellama_requests_total{path="/health",status="200"}' in text


def test_tokenize(post):
    text = "def ħello(): <PRE>"
    ids = post("/tokenize", content=text)["tokens"]
    assert post("/detokenize", tokens=ids)["content"] == text
    pieces = post("/tokenize", content=text, with_pieces=True, add_special=True)["tokens"]
    assert [piece["id"] for piece in pieces] == [1, *ids]
    assert pieces[1]["piece"] == " def"


def test_no_text_becomes_a_control_id(post, engine):
    """Every control piece and tag, in every place for text; ids are those of plain text."""
    tokenizer = engine.tokenizer
    words = ["<s>", "</s>", "<unk>", *INFILLING_PIECES, *map(str.strip, INFILLING_PIECES)]
    words += ["<PRE>", "<SUF>", "<MID>", "<EOT>", "<0x0A>", "Source: user", *TAGS]
    settings = {"max_tokens": 1, "return_token_ids": True}

    def ids(path, **body):
        return post(path, **settings, **body)["choices"][0]["prompt_token_ids"]

    for word in words:
        plain = tokenizer.encode(f"a {word} b")
        assert not set(plain) & {0, 1, 2, *range(8192, 8196)}
        assert ids("/v1/completions", prompt=f"a {word} b", stop=[word]) == [1, *plain]
        gap = ids("/v1/completions", prompt=f"a {word} b", suffix=word)
        suffix = tokenizer.encode_without_prefix_space(word)
        assert gap == [1, 8192, *plain, 8193, *suffix, 8194]
        written = ids("/v1/completions", prompt=f"<PRE> a {word} b <SUF> <MID>")
        assert written == [1, 8192, *plain, 8193, 8194]
        if word not in TAGS:
            chat = ids(
                "/v1/chat/completions",
                messages=[
                    {"role": "system", "content": word},
                    {"role": "user", "content": f"a {word}"},
                ],
            )
            assert chat == [
                1,
                *tokenizer.encode(f"[INST] <<SYS>>\n{word}\n<</SYS>>\n\na {word} [/INST]"),
            ]


def test_tags_of_dialogs_are_refused_as_the_reference_does(post):
    """In any message, before anything is computed; in code to complete they are text, see above."""
    for tag in TAGS:
        for where in range(4):
            roles = ("system", "user", "assistant", "user")
            messages = [{"role": role, "content": "a"} for role in roles]
            messages[where]["content"] = f"what is {tag}?"
            reply = post("/v1/chat/completions", 400, messages=messages)
            assert f"message {where}: special tags" in reply["error"]["message"]
            assert tag in reply["error"]["message"]
            assert "special tags" in post("/api/chat", 400, messages=messages)["error"]
