"""What the server adds to the engine: throughput, overhead, time to the first token, many streams.

Everything runs in this process, engine and server alike, so that both have the same cores:

    throughput   32 requests at a time over HTTP beside `Engine.complete` with 32 prompts
    overhead     one request at a time, no tokens but one, beside the engine; and for each token,
                 whole and streamed
    streams      200 streams at once: first tokens, and whether each has the text of a lone request
    crowd        1,000 requests at once where 64 have a place: how soon the others hear 429
    leaving      clients that leave at random moments: memory and blocks before and after
    keystrokes   a file of 2,000 lines is typed on; beside llama.cpp's server with --peer URL:
                 its own (the same /infill requests) or llama-cpp-python's (the prompts as texts)

    python bench/serve.py [--only PART,…] [--tokens 64] [--streams 200] [--peer URL] …

With --dtype float32 every stream must have the text of a lone request; in bfloat16 two tokens that
are as good as equal may change places. Start the peer on the same weights (`codellama convert …
--to gguf`) and the same cores. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import random
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import uvicorn

from codellama.engine import Engine, SamplingParams
from codellama.serve import Limits, Service, create_app
from codellama.serve.guard import Protocol

N_PREFIX, N_SUFFIX = 40, 10  # lines around the cursor, as docs/editors.md sets editors up
SOURCE = Path(json.__file__).parent.parent / "argparse.py"


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, count in (
        ("streams", 200),
        ("leavers", 1000),
        ("tokens", 64),
        ("keystrokes", 40),
        ("crowd", 1000),
    ):
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--only", default="", help="parts, between commas")
    parser.add_argument("--model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--peer", help="address of llama.cpp's server")
    options = parser.parse_args()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    engine = Engine(options.model, dtype=options.dtype)
    url = listen(engine)
    text = SOURCE.read_text()
    parts: dict[str, Callable[[], dict[str, object]]] = {
        "throughput": lambda: throughput(engine, url, text, options.tokens),
        "overhead": lambda: overhead(engine, url),
        "streams": lambda: asyncio.run(streams(engine, url, text, options.streams, options.tokens)),
        "leaving": lambda: asyncio.run(leaving(engine, url, options.leavers)),
        "crowd": lambda: asyncio.run(crowd(listen(engine, 64), options.crowd)),
        "keystrokes": lambda: editing(url, options.peer, text, options.keystrokes),
    }
    results: dict[str, object] = {}
    for name in options.only.split(",") if options.only else parts:
        begin = time.perf_counter()
        results |= parts[name]()
        print(f"{name}: {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    print(json.dumps(results))


def listen(engine: Engine, max_texts: int = 1024) -> str:
    service = Service(engine, engine.tokenizer, "codellama", {}, Limits(max_texts=max_texts))
    config = uvicorn.Config(
        create_app(lambda: service),
        port=8300 + max_texts,
        http=Protocol,
        log_level="error",
        access_log=False,
        proxy_headers=False,  # as `codellama serve`; a wrapper around the app would cost its guard
    )
    threading.Thread(target=uvicorn.Server(config).run, daemon=True).start()
    url = f"http://127.0.0.1:{config.port}"
    while True:
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return url
        except httpx.TransportError:
            time.sleep(0.05)


def excerpts(text: str, count: int) -> list[str]:
    lines = text.splitlines(keepends=True)
    step = max(1, len(lines) // count)
    return ["".join(lines[i * step % len(lines) :][:12]) for i in range(count)]


def body_of(prompt: str, n_tokens: int, **more: object) -> dict[str, object]:
    known = {"prompt": prompt, "max_tokens": n_tokens, "temperature": 0}
    return known | {"logit_bias": {"2": -100}} | more  # no end before its time


async def ask_all(url: str, bodies: list[dict[str, object]]) -> list[str]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        replies = await asyncio.gather(
            *(client.post("/v1/completions", json=body) for body in bodies)
        )
    return [reply.json()["choices"][0]["text"] for reply in replies]


def throughput(engine: Engine, url: str, text: str, n_tokens: int) -> dict[str, float]:
    """Tokens a second of 32 at a time: the engine alone, over HTTP, and over HTTP in streams."""
    params = SamplingParams(n_tokens, logit_bias=((2, -100.0),))
    rates: dict[str, list[float]] = {"engine": [], "http": [], "http_streams": []}
    for repeat in range(3):
        # Other prompts each time: nothing is found in the cache of the one before.
        prompts = [f"# {repeat} {name}\n{p}" for p in excerpts(text, 32) for name in rates]
        for number, name in enumerate(rates):
            begin = time.perf_counter()
            if name == "engine":
                engine.complete(prompts[number::3], params)
            else:
                bodies = [body_of(prompt, n_tokens) for prompt in prompts[number::3]]
                if name == "http_streams":
                    asyncio.run(stream_all(url, [body | {"stream": True} for body in bodies]))
                else:
                    asyncio.run(ask_all(url, bodies))
            rates[name].append(32 * n_tokens / (time.perf_counter() - begin))
    best = {name: statistics.median(values) for name, values in rates.items()}
    report = {f"{name}_tokens_per_s": round(value, 1) for name, value in best.items()}
    return report | {
        "throughput_share": round(best["http"] / best["engine"], 3),
        "throughput_share_of_streams": round(best["http_streams"] / best["engine"], 3),
    }


def overhead(engine: Engine, url: str) -> dict[str, float]:
    """Milliseconds that a lone request, and each of its tokens, takes longer than in the engine.

    Whole, and as a stream with an event for each token.
    """
    durations: dict[tuple[str, int], list[float]] = {}

    def timed(kind: str, n_tokens: int, work: Callable[[], object]) -> None:
        begin = time.perf_counter()
        work()
        durations.setdefault((kind, n_tokens), []).append(time.perf_counter() - begin)

    with httpx.Client(base_url=url, timeout=120) as client:

        def post(body: dict[str, object]) -> None:
            assert client.post("/v1/completions", json=body).status_code == 200

        for n_tokens in (1, 129):
            params = SamplingParams(n_tokens, logit_bias=((2, -100.0),))
            for number in range(30):
                prompt = f"x{number} = "
                body = body_of(prompt, n_tokens)
                timed("engine", n_tokens, lambda p=prompt, s=params: engine.complete([p], s))
                timed("", n_tokens, lambda b=body: post(b))
                timed("_streamed", n_tokens, lambda b=body: post(b | {"stream": True}))
    found = {key: 1000 * statistics.median(values) for key, values in durations.items()}
    report: dict[str, float] = {}
    for kind in ("", "_streamed"):
        first, all_of = (found[kind, n] - found["engine", n] for n in (1, 129))
        report[f"overhead{kind}_ms"] = round(first, 3)
        report[f"overhead{kind}_ms_per_token"] = round((all_of - first) / 128, 4)
    return report


async def stream_all(url: str, bodies: list[dict[str, object]]) -> list[tuple[str, float, float]]:
    """(text, seconds to the first token, seconds in all) of streams that begin together."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        async def one(body: dict[str, object]) -> tuple[str, float, float]:
            begin, first, text = time.perf_counter(), 0.0, ""
            async with client.stream("POST", "/v1/completions", json=body) as reply:
                async for line in reply.aiter_lines():
                    if line.startswith("data: {"):
                        first = first or time.perf_counter() - begin
                        text += json.loads(line[6:])["choices"][0]["text"]
            return text, first, time.perf_counter() - begin

        return await asyncio.gather(*(one(body) for body in bodies))


async def streams(
    engine: Engine, url: str, text: str, count: int, n_tokens: int
) -> dict[str, object]:
    prompts = [f"# {number}\n{excerpt}" for number, excerpt in enumerate(excerpts(text, count))]
    found = await stream_all(url, [body_of(prompt, n_tokens, stream=True) for prompt in prompts])
    params = SamplingParams(n_tokens, logit_bias=((2, -100.0),))
    alone = [engine.complete([prompt], params)[0].text for prompt in prompts]
    first = sorted(seconds for _, seconds, _ in found)
    return {
        "streams": count,
        "streams_as_alone": sum(a == b for a, (b, _, _) in zip(alone, found, strict=True)),
        "first_token_p50_s": round(statistics.median(first), 3),
        "first_token_p95_s": round(first[int(0.95 * (len(first) - 1))], 3),
        "slowest_stream_s": round(max(seconds for _, _, seconds in found), 3),
    }


async def crowd(url: str, count: int) -> dict[str, object]:
    """Over bare sockets, which cost this process less than a client would."""
    body = json.dumps(body_of("def f(x):", 16)).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
    head += "content-type: application/json\r\nconnection: close\r\n\r\n"
    port = int(url.rpartition(":")[2])
    found: dict[str, list[float]] = {}

    async def one(request: bytes, number: int = 0) -> None:
        await asyncio.sleep(number / 1000)  # a thousand connections a second
        begin = time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        status = (await reader.readline()).split()[1].decode()
        found.setdefault(status, []).append(time.perf_counter() - begin)
        await reader.read()
        writer.close()

    async def health() -> None:
        request = b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
        while True:
            begin = time.perf_counter()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request)
            await reader.read()
            writer.close()
            found.setdefault("health", []).append(time.perf_counter() - begin)
            await asyncio.sleep(0.02)

    watching = asyncio.create_task(health())
    await asyncio.gather(*(one(head.encode() + body, number) for number in range(count)))
    watching.cancel()
    report: dict[str, object] = {"crowd": {key: len(times) for key, times in found.items()}}
    for key, times in found.items():
        slowest = sorted(times)[int(0.99 * (len(times) - 1))]
        report[f"crowd_{key}_p99_ms"] = round(1000 * slowest, 1)
    return report


async def leaving(engine: Engine, url: str, count: int) -> dict[str, object]:
    rng = random.Random(0)

    def memory_mb() -> float:
        gc.collect()
        fields = Path("/proc/self/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    async def leave(client: httpx.AsyncClient) -> None:
        body = body_of("a" * rng.randint(1, 200), 500, stream=rng.random() < 0.5)
        task = asyncio.create_task(client.post("/v1/completions", json=body))
        await asyncio.sleep(rng.choice((0, 0.001, 0.01, 0.1, 0.3)))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    before = 0.0
    for _ in range(-(-count // 50)):
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            await asyncio.gather(*(leave(client) for _ in range(50)))
        before = before or memory_mb()  # with what the first requests leave for good
    await asyncio.sleep(0.5)
    return {
        "leavers": count,
        "memory_growth_mb": round(memory_mb() - before, 1),
        "blocks_in_use": engine._scheduler.pool.n_used,
    }


def editing(url: str, peer: str | None, text: str, count: int) -> dict[str, object]:
    """Keystrokes with and without SPM, and at the peer, one after the other."""
    found: dict[str, object] = {"keystrokes": keystrokes(url, text, count)}
    found["keystrokes_suffix_first"] = keystrokes(url, text, count, True)
    if peer:
        found["keystrokes_of_peer"] = keystrokes(peer, text, count)
    return found


def keystrokes(
    url: str, text: str, count: int, suffix_first: bool | None = None
) -> dict[str, float]:
    """Medians over suggestions while a function is typed in the middle of a file."""
    lines = text.splitlines(keepends=True)[:2000]
    prefix, suffix = "".join(lines[:1000]), "".join(lines[1000 : 1000 + N_SUFFIX])
    typed = "    def __len__(self):\n        return len(self._actions)\n" * 4
    first_ms, rates = [], []
    with httpx.Client(base_url=url, timeout=120) as client:
        path = "/infill" if client.post("/infill").status_code != 404 else "/v1/completions"
        for end in range(1, count + 1):
            before = (prefix + typed[:end]).splitlines(keepends=True)[-N_PREFIX:]
            if path == "/infill":
                where = {"input_prefix": "".join(before[:-1]), "prompt": before[-1]}
                where |= {"input_suffix": suffix, "n_predict": 16, "cache_prompt": True}
                body = where | {"suffix_first": suffix_first}
            else:  # llama-cpp-python's, which takes the pieces of control ids from a text
                pieces = f"\u2581<PRE>{''.join(before)}\u2581<SUF>{suffix}\u2581<MID>"
                body = {"prompt": pieces, "max_tokens": 16}
            body |= {"temperature": 0, "stream": True}
            begin, first, n_tokens = time.perf_counter(), 0.0, 0
            with client.stream("POST", path, json=body) as reply:
                assert reply.status_code == 200, reply.read()
                for line in reply.iter_lines():
                    if line.startswith("data: {"):
                        first = first or time.perf_counter() - begin
                        n_tokens += 1
                        last = json.loads(line[6:])
            if end > 1:  # the first finds nothing in the cache
                first_ms.append(1000 * first)
                n_tokens = last.get("timings", {}).get("predicted_n", n_tokens)
                rates.append(n_tokens / (time.perf_counter() - begin))
    return {
        "first_token_ms": round(statistics.median(first_ms), 1),
        "first_token_p95_ms": round(sorted(first_ms)[int(0.95 * (len(first_ms) - 1))], 1),
        "tokens_per_s": round(statistics.median(rates), 1),
    }


if __name__ == "__main__":
    sys.exit(main())
