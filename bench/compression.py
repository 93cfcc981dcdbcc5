"""Bits per byte on held-out files: the model, gzip and xz on the same bytes.

    .venv/bin/python bench/compression.py [--model M] [--corpus work/tiny/corpus] [--files 400]

Every file is coded on its own, by all three. The model reads a file in windows of its context, each
window starting half a context back, so that every token after the first window is predicted from at
least half a context. xz of all files as one stream is given too: it may use what the files share.
The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import math
import random
import time

from codellama import Engine
from codellama.data.corpus import corpus_documents


def model_nats(engine: Engine, ids: list[int]) -> float:
    """Nats to code the ids after the first."""
    context = engine.max_context
    total = 0.0
    done = 1
    while done < len(ids):
        begin = max(0, done - context // 2)
        window = ids[begin : begin + context]
        scores = engine.score([window])[0]
        total -= sum(scores[done - begin - 1 :])
        done = begin + len(window)
    return total


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--corpus", default="work/tiny/corpus")
    parser.add_argument("--files", type=int, default=400)
    options = parser.parse_args()
    texts = list(corpus_documents(options.corpus, "validation"))
    random.Random(0).shuffle(texts)
    texts = texts[: options.files]
    contents = [text.encode("utf-8") for text in texts]
    n_bytes = sum(map(len, contents))
    engine = Engine(options.model)
    begin = time.perf_counter()
    encode = engine.tokenizer.encode
    nats = sum(model_nats(engine, encode(text, bos=True, eos=True)) for text in texts)
    result = {
        "bench": "compression",
        "n_files": len(texts),
        "n_bytes": n_bytes,
        "bits_per_byte": {
            "model": nats / math.log(2) / n_bytes,
            "gzip": 8 * sum(len(gzip.compress(data, 9)) for data in contents) / n_bytes,
            "xz": 8 * sum(len(lzma.compress(data, preset=9)) for data in contents) / n_bytes,
            "xz_one_stream": 8 * len(lzma.compress(b"".join(contents), preset=9)) / n_bytes,
        },
        "duration_s": round(time.perf_counter() - begin, 1),
    }
    result["bits_per_byte"] = {k: round(v, 4) for k, v in result["bits_per_byte"].items()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
