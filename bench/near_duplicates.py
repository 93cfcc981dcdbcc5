"""Near duplicates: ours, datatrove's MinHash pipeline and rensa on the same real files in one run.

    python bench/near_duplicates.py [FILE_OR_FOLDER ...] [--files 3000]

Takes Python files of the folders and wheels (by default of installed packages) and an edited copy
of every third. Which pairs are alike by 0.8 is computed exactly, not estimated. Each program gets
the same texts, already cut into words at blanks, and its own defaults otherwise: 5-grams, ours 256
hashes in 32 bands, datatrove 112 in 14, rensa as ours. Rates are by processor time of all threads,
from text to clusters. A pair is found where both are in one cluster; clusters also join what a
third connects, so beside the precision of pairs stands that of documents: how many of those in a
cluster are alike by 0.8 to another one in it. The last line is one JSON object; the lines before it
are a table. Peers that are not installed are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import struct
import sysconfig
import tempfile
import time
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from codellama.data.near_dedup import _BLANKS, representatives, signatures
from codellama.recipe import NearDuplicates

SETTINGS = NearDuplicates()
Pairs = set[tuple[int, int]]


def python_files(places: list[Path], rng: random.Random) -> Iterator[str]:
    """Texts of 500 to 100,000 bytes, in random order."""
    found: list[tuple[Path, str]] = []
    for place in places:
        found += [
            (path, "") for path in (sorted(place.rglob("*.py")) if place.is_dir() else [place])
        ]
        for wheel in sorted(place.glob("*.whl")) if place.is_dir() else []:
            with zipfile.ZipFile(wheel) as archive:
                found += [(wheel, name) for name in archive.namelist() if name.endswith(".py")]
    rng.shuffle(found)
    for path, name in found:
        with contextlib.suppress(OSError):
            content = zipfile.ZipFile(path).read(name) if name else path.read_bytes()
            if 500 < len(content) < 100_000:
                yield content.decode("utf-8", "ignore")


def sample(places: list[Path], n_files: int) -> list[str]:
    """Files, and of every third a copy with up to one word in 25 changed; words between blanks."""
    rng = random.Random(0)
    texts: list[str] = []
    for text in python_files(places, rng):
        words = text.encode().translate(_BLANKS).decode("utf-8", "ignore").split()
        texts.append(" ".join(words))
        if len(texts) % 4 == 0:
            for _ in range(rng.randrange(1 + len(words) // 25)):
                words[rng.randrange(len(words))] = f"edit{rng.randrange(10**6)}"
            texts.append(" ".join(words))
        if len(texts) >= n_files:
            break
    return texts


def exact_pairs(texts: list[str], threshold: float) -> dict[tuple[int, int], float]:
    """All pairs whose Jaccard similarity reaches the threshold.

    Two sets that are alike by t share one of the |A| - t|A| + 1 rarest members of A: only pairs
    that do are compared, each exactly.
    """
    n = SETTINGS.ngram
    numbers: dict[str, int] = {}
    sets: list[set[int]] = []
    for text in texts:
        words = text.split()
        grams = {" ".join(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}
        sets.append({numbers.setdefault(gram, len(numbers)) for gram in grams})
    n_with = Counter(gram for grams in sets for gram in grams)
    where: dict[int, list[int]] = defaultdict(list)
    found: dict[tuple[int, int], float] = {}
    for b, grams in enumerate(sets):
        rare = sorted(grams, key=lambda gram: (n_with[gram], gram))
        rare = rare[: int(len(grams) * (1 - threshold) + 1e-9) + 1]
        for a in {a for gram in rare for a in where[gram]}:
            shared = len(grams & sets[a])
            if shared >= threshold * (len(grams) + len(sets[a]) - shared):
                found[a, b] = shared / (len(grams) + len(sets[a]) - shared)
        for gram in rare:
            where[gram].append(b)
    return found


def pairs_of(clusters: dict[Any, list[int]]) -> Pairs:
    """Every pair of each cluster."""
    return {(a, b) for m in clusters.values() for i, a in enumerate(m) for b in m[i + 1 :]}


def connected(pairs: Iterator[tuple[int, int]], n: int) -> dict[Any, list[int]]:
    """Clusters of all that pairs connect."""
    parent = list(range(n))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for a, b in pairs:
        a, b = root(a), root(b)
        parent[max(a, b)] = min(a, b)
    clusters: dict[Any, list[int]] = defaultdict(list)
    for i in range(n):
        clusters[root(i)].append(i)
    return clusters


def ours(texts: list[str]) -> Pairs:
    sizes = np.array([len(text) for text in texts])
    chosen = representatives(signatures(texts, SETTINGS), np.zeros(len(texts)), sizes, SETTINGS)
    clusters: dict[Any, list[int]] = defaultdict(list)
    for index, representative in enumerate(chosen.tolist()):
        clusters[representative].append(index)
    return pairs_of(clusters)


def datatrove(texts: list[str]) -> Pairs:
    """Its three steps as they are; words are cut by `str.split`, its fastest."""
    from datatrove.data import Document
    from datatrove.pipeline.dedup import minhash
    from datatrove.utils.text import TextNormConfig

    as_it_is = TextNormConfig(*[False] * 7)
    config = minhash.MinhashConfig(n_grams=SETTINGS.ngram, norm_config=as_it_is)
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stderr(io.StringIO()):
        signature = minhash.MinhashDedupSignature.__new__(minhash.MinhashDedupSignature)
        minhash.load_word_tokenizer = lambda _: SimpleNamespace(word_tokenize=str.split)  # type: ignore[assignment]
        signature.__init__(f"{name}/signatures", config)
        signature.run(iter([Document(text, str(i)) for i, text in enumerate(texts)]))
        buckets = minhash.MinhashDedupBuckets(
            f"{name}/signatures", f"{name}/buckets", config=config
        )
        for bucket in range(config.num_buckets):
            buckets.run(None, bucket, config.num_buckets)
        ids = minhash.MinhashDedupCluster(
            f"{name}/buckets", f"{name}/ids", config, save_cluster_id=True
        )
        ids.run(None, 0, 1)
        clusters: dict[Any, list[int]] = defaultdict(list)
        for file in Path(name, "ids").glob("*.clusters"):
            for document, cluster in struct.iter_unpack("<II", file.read_bytes()):
                clusters[cluster].append(document)
    return pairs_of(clusters)


def rensa(texts: list[str]) -> Pairs:
    """Its functions for many documents at once, with our number of hashes and bands."""
    from rensa import RMinHash, RMinHashLSH

    n = SETTINGS.ngram
    grams: list[list[str]] = []
    for text in texts:
        words = text.split()
        grams.append([" ".join(words[i : i + n]) for i in range(max(1, len(words) - n + 1))])
    hashes = RMinHash.from_token_sets(grams, num_perm=SETTINGS.n_hashes, seed=1)
    index = RMinHashLSH(SETTINGS.threshold, SETTINGS.n_hashes, SETTINGS.n_bands)
    index.insert_many(hashes)
    alike = (
        (a, b)
        for a, found in enumerate(index.query_all(hashes))
        for b in found
        if a < b and hashes[a].jaccard(hashes[b]) >= SETTINGS.threshold
    )
    return pairs_of(connected(alike, len(texts)))


def measure(
    run: Callable[[list[str]], Pairs], texts: list[str], exact: dict[tuple[int, int], float]
) -> dict[str, float] | None:
    """Rate, recall of pairs alike by 0.8, precision of pairs and of documents in clusters."""
    cpu, wall = time.process_time(), time.perf_counter()
    try:
        found = run(texts)
    except ImportError as error:
        print(f"{run.__name__}: not measured: {error}")
        return None
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    wanted = {pair for pair, value in exact.items() if value >= SETTINGS.threshold}
    clustered = {index for pair in found for index in pair}
    rightly = {index for pair in found & wanted for index in pair}
    return {
        "mb_per_cpu_s": round(sum(map(len, texts)) / 1e6 / cpu, 2),
        "wall_s": round(wall, 1),
        "recall": round(len(found & wanted) / len(wanted), 4),
        "pair_precision": round(len(found & wanted) / len(found), 4),
        "pair_precision_at_0.7": round(len(found & exact.keys()) / len(found), 4),
        "document_precision": round(len(rightly) / len(clustered), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("places", type=Path, nargs="*")
    parser.add_argument("--files", type=int, default=3000)
    options = parser.parse_args()
    places = options.places or [Path(sysconfig.get_path("purelib"))]
    texts = sample(places, options.files)
    exact = exact_pairs(texts, 0.7)
    signatures(texts[:10], SETTINGS)  # what is loaded once
    rows = {run.__name__: measure(run, texts, exact) for run in (ours, datatrove, rensa)}
    rows = {name: row for name, row in rows.items() if row}
    print(f"| | {' | '.join(rows['ours'])} |\n|---|{'---:|' * len(rows['ours'])}")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(map(str, row.values()))} |")
    facts = {
        "files": len(texts),
        "mb": round(sum(map(len, texts)) / 1e6, 1),
        "true_pairs": sum(value >= SETTINGS.threshold for value in exact.values()),
    }
    print(json.dumps(facts | rows))


if __name__ == "__main__":
    main()
