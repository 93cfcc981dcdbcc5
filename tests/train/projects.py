"""A recipe with a small corpus and a fixed vocabulary, the same on every machine."""

import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa

from codellama.artifact import new_folder, write_manifest
from codellama.data.corpus import KIND, SCHEMA, ShardWriter
from codellama.recipe import Recipe, load_recipe
from codellama.tokenizer import Tokenizer
from codellama.tokenizer.model_file import BYTE, CONTROL, UNKNOWN, ModelFile, Piece
from codellama.tokenizer.variants import INFILLING_PIECES

MERGES = ("▁▁", "▁▁▁▁", "in", "re", "er", "de", "def", "▁def", "ur", "urn", "ret", "return", "va")
CHARACTERS = '▁abcdefghijklmnopqrstuvwxyz0123456789_()[]:,.=+-*"#ABCDEFGHIJKLMNOPQRSTUVWXYZ'

RECIPE = """
name = "test"
work = "{work}"
[[corpus.sources]]
name = "none"
kind = "stdlib"
[model]
name = "tiny"
[model.overrides]
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
intermediate_size = 64
vocab_size = {vocab_size}
[stages.code]
seq_len = 64
batch_tokens = 512
micro_batch = 4
steps = 24
peak_lr = 1e-2
warmup_steps = 4
dtype = "float32"
compile = false
validate_every = 10
validation_tokens = 1000
save_every = 3
"""


def fixed_tokenizer() -> Tokenizer:
    """A vocabulary that no training and no version of a library changes."""
    special = [
        Piece("<unk>", 0.0, UNKNOWN),
        Piece("<s>", 0.0, CONTROL),
        Piece("</s>", 0.0, CONTROL),
    ]
    pieces = [
        *special,
        *(Piece(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)),
        *(Piece(text, -float(i)) for i, text in enumerate(MERGES)),
        *(Piece(text, -1000.0 - i) for i, text in enumerate(CHARACTERS)),
        *(Piece(text, 0.0, CONTROL) for text in INFILLING_PIECES),
    ]
    return Tokenizer(ModelFile(tuple(pieces)))


def make_texts(n: int, seed: int) -> list[str]:
    """Python functions that are alike enough to be learned from."""
    rng = random.Random(seed)
    texts = []
    for _ in range(n):
        lines = []
        for _ in range(rng.randrange(1, 5)):
            a, b = rng.choice("xyz"), rng.choice(["value", "total", "items", "n"])
            lines += [f"def {rng.choice(['get', 'add', 'make'])}_{b}({a}, {b}):"]
            lines += [
                f"    {a} = {a} {rng.choice('+-*')} {rng.randrange(100)}",
                f"    return {a}",
                "",
            ]
        texts.append("\n".join(lines) + "\n")
    return texts


def write_corpus(folder: Path, train: list[str], validation: list[str]) -> None:
    with new_folder(folder) as temporary:
        shards = []
        for split, texts in (("train", train), ("validation", validation)):
            writer = ShardWriter(temporary, split)
            rows = []
            for text in texts:
                row = dict.fromkeys(("source", "repository", "path", "licence"), "x")
                digest = hashlib.sha256(text.encode()).hexdigest()
                n_bytes = len(text.encode())
                row |= {"text": text, "n_bytes": n_bytes, "sha256": digest}
                rows.append({**row, "language": "python", "split": split})
            writer.add(pa.Table.from_pylist(rows, schema=SCHEMA))
            writer.close()
            shards += writer.shards
        fingerprint = hashlib.sha256(json.dumps(shards).encode()).hexdigest()
        write_manifest(temporary, KIND, shards=shards, fingerprint=fingerprint)


def make_project(work: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Write corpus, tokenizer and recipe below `work`."""
    write_corpus(work / "corpus", make_texts(60, 0), make_texts(12, 1))
    tokenizer = fixed_tokenizer()
    (work / "tokenizer").mkdir()
    tokenizer.save(work / "tokenizer")
    text = RECIPE.format(work=work.as_posix(), vocab_size=tokenizer.vocab_size)
    (work / "recipe.toml").write_text(text)
    return load_recipe(work / "recipe.toml", overrides)


class Driver:
    """A process that trains in children; see driver.py. Started once for all tests of a worker."""

    def __init__(self) -> None:
        program = [sys.executable, str(Path(__file__).parent / "driver.py")]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(program, stdin=pipe, stdout=pipe, text=True)

    def __call__(self, work: Path, *runs: dict) -> list[dict]:
        """Train in a process of its own for each of `runs`, one after another."""
        assert self._process.stdin
        assert self._process.stdout
        results = []
        for run in runs:
            request = {"recipe": str(work / "recipe.toml"), **run}
            print(json.dumps(request), file=self._process.stdin, flush=True)
            results.append(json.loads(self._process.stdout.readline()))
        return results

    def close(self) -> None:
        self._process.communicate()


def training_rows(work: Path, stage: str = "code") -> list[dict]:
    """The rows of metrics.jsonl that are steps."""
    lines = (work / "runs" / stage / "metrics.jsonl").read_text().splitlines()
    return [row for line in lines if "loss" in (row := json.loads(line))]
