"""The loader with infilling beside SentencePiece alone, on the same documents, on one core.

    python bench/loader.py CORPUS TOKENIZER [--rows 300]

Packs rows of 4,096 tokens as training does (infilling of 0.9 of the documents, half of them suffix
first) and, for each document that was packed, encodes its text by SentencePiece and nothing else.
Rates are tokens per second of processor time, taken in turns; the overhead is what packing costs on
top. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from codellama.data.corpus import CorpusReader
from codellama.data.packing import Lane, PackingSettings, Share
from codellama.tokenizer import Tokenizer

ROWS_A_TURN = 20


class Recorded:
    """A corpus that remembers the texts that were asked for."""

    def __init__(self, reader: CorpusReader) -> None:
        self._reader, self.texts = reader, dict[int, str]()

    def __len__(self) -> int:
        return len(self._reader)

    def text(self, index: int) -> str:
        self.texts[index] = text = self._reader.text(index)
        return text

    def sha256(self, index: int) -> str:
        return self._reader.sha256(index)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--rows", type=int, default=300)
    options = parser.parse_args()
    documents = Recorded(CorpusReader(options.corpus, "train", verify=False))
    settings = PackingSettings(seq_len=4096, fim_rate=0.9, shuffle=False)
    # Decoded row groups stay in memory: in order, each is read from disk once.
    lane = Lane([Share("corpus", documents)], Tokenizer.load(options.tokenizer), settings, 0, 1)
    model = options.tokenizer
    model = model / "tokenizer.model" if model.is_dir() else model
    plain: Any = SentencePieceProcessor(model_file=str(model))
    lane.next_sequence()
    times, tokens = {"loader": 0.0, "sentencepiece": 0.0}, {"loader": 0, "sentencepiece": 0}
    for _ in range(options.rows // ROWS_A_TURN):
        documents.texts.clear()
        begin = time.process_time()
        for _ in range(ROWS_A_TURN):
            lane.next_sequence()
        times["loader"] += time.process_time() - begin
        tokens["loader"] += ROWS_A_TURN * settings.seq_len
        texts = list(documents.texts.values())
        begin = time.process_time()
        tokens["sentencepiece"] += sum(len(plain.encode(text)) for text in texts)
        times["sentencepiece"] += time.process_time() - begin
    rates = {name: tokens[name] / times[name] for name in times}
    overhead = rates["sentencepiece"] / rates["loader"] - 1
    print(
        json.dumps(
            {f"{name}_tokens_per_cpu_s": round(rate) for name, rate in rates.items()}
            | {"overhead": round(overhead, 3), "tokens": tokens["loader"]}
        )
    )


if __name__ == "__main__":
    main()
