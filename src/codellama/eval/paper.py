"""Numbers of the Code Llama paper and of others it quotes, to stand beside ours.

Source: arXiv 2308.12950 version 3; the table of each block is named. Models are named by size and
variant, `7b`, `7b-python`, `7b-instruct`; those of others by their names with dashes.
"""

from __future__ import annotations

# Measures in the order of the columns (percent unless said), then a line for each model.
# Table 2; the greedy runs give pass@1, those at temperature 0.8 the others.
_TABLE_2 = """
humaneval:pass@1 humaneval:pass@10 humaneval:pass@100 mbpp:pass@1 mbpp:pass@10 mbpp:pass@100
7b 33.5 59.6 85.9 41.4 66.7 82.5
13b 36.0 69.4 89.8 47.0 71.7 87.1
34b 48.8 76.8 93.0 55.0 76.2 86.6
70b 53.0 84.6 96.2 62.4 81.1 91.9
7b-instruct 34.8 64.3 88.1 44.4 65.4 76.8
13b-instruct 42.7 71.6 91.6 49.4 71.2 84.1
34b-instruct 41.5 77.2 93.5 57.0 74.6 85.4
70b-instruct 67.8 90.3 97.3 62.2 79.6 89.2
7b-python 38.4 70.3 90.6 47.6 70.3 84.8
13b-python 43.3 77.4 94.1 49.0 74.0 87.6
34b-python 53.7 82.8 94.7 56.2 76.4 88.2
70b-python 57.3 89.3 98.4 65.6 81.5 91.9
Llama-2-7B 12.2 25.2 44.4 20.8 41.8 65.5
Llama-2-70B 30.5 59.4 87.0 45.4 66.2 83.1
StarCoder-Base-15.5B 30.4 - - 49.0 - -
code-cushman-001 33.5 - - 45.9 - -
GPT-3.5 48.1 - - 52.2 - -
GPT-4 67.0 - - - - -
"""
# Table 3, by difficulty.
_TABLE_3 = """
apps/introductory:pass@5 apps/introductory:pass@10 apps/introductory:pass@100 \
apps/interview:pass@5 apps/interview:pass@10 apps/interview:pass@100 \
apps/competition:pass@5 apps/competition:pass@10 apps/competition:pass@100
7b 10.8 15.6 33.5 2.0 3.1 9.4 0.8 1.4 7.1
13b 23.7 30.2 49.0 5.6 8.1 18.4 2.1 3.4 12.0
34b 32.8 39.0 56.3 8.8 12.2 24.3 2.9 4.7 15.4
7b-python 12.7 18.5 38.3 4.2 6.3 14.9 1.3 2.2 9.1
13b-python 26.3 32.8 51.6 7.1 10.0 21.5 2.8 4.3 14.6
34b-python 28.9 35.9 54.9 7.8 11.1 23.9 3.5 5.5 16.8
7b-instruct 12.9 17.9 35.4 2.1 3.1 9.4 1.1 2.0 8.5
13b-instruct 24.0 30.3 48.7 6.9 9.6 19.6 2.4 3.8 13.1
34b-instruct 31.6 37.8 55.7 7.9 11.1 22.8 3.2 5.1 16.4
"""
# Table 4.
_TABLE_4 = """
multipl-e-cpp:pass@1 multipl-e-java:pass@1 multipl-e-php:pass@1 multipl-e-ts:pass@1 \
multipl-e-cs:pass@1 multipl-e-sh:pass@1
7b 28.6 34.2 24.2 33.3 25.3 12.0
13b 39.1 38.0 34.2 29.6 27.3 15.2
34b 47.8 45.6 44.1 33.3 30.4 17.1
70b 52.8 51.9 50.9 49.1 38.0 29.1
7b-instruct 31.1 30.4 28.6 32.7 21.6 10.1
13b-instruct 42.2 40.5 32.3 39.0 24.0 13.9
34b-instruct 45.3 43.7 36.6 40.3 31.0 19.6
70b-instruct 53.4 58.2 58.4 39.0 36.7 29.7
7b-python 32.3 35.4 32.3 23.9 24.7 16.5
13b-python 39.1 37.3 33.5 35.2 29.8 13.9
34b-python 42.2 44.9 42.9 34.3 31.7 14.6
70b-python 54.7 57.6 53.4 44.0 34.8 25.3
StarCoder-Base-15.5B 30.6 28.5 26.8 32.2 20.6 11.0
code-cushman-001 30.6 31.9 28.9 31.3 22.1 11.7
"""
# Tables 6, 13 and 14; models after long-context fine-tuning. Table 14's random spans are the full
# set or the light one: the paper does not say.
_TABLES_6_13_14 = """
humaneval-single-line-psm:pass@1 humaneval-single-line-spm:pass@1 \
humaneval-multi-line-psm:pass@1 humaneval-multi-line-spm:pass@1 \
humaneval-random-span-light-psm:pass@1 humaneval-random-span-light-spm:pass@1 \
multipl-e-infilling-psm/py:exact_match multipl-e-infilling-spm/py:exact_match \
multipl-e-infilling-psm/java:exact_match multipl-e-infilling-spm/java:exact_match \
multipl-e-infilling-psm/js:exact_match multipl-e-infilling-spm/js:exact_match docstrings:bleu
7b 74.1 83.3 48.2 50.8 59.7 39.0 67.6 72.7 74.3 77.6 80.2 82.6 20.37
13b 75.9 85.6 51.0 56.1 63.6 41.9 68.3 74.5 77.6 80.0 80.7 85.0 21.15
InCoder-6B 69.0 - 38.6 - - - - 31.0 - 49.0 - 51.0 18.27
"""
# Table 12 (after GSM8K's test set), and table 9: percent, BOLD's mean sentiment times 100.
_TABLES_9_12 = """
gsm8k:solved truthfulqa:truthful_and_informative toxigen:toxic bold:sentiment
7b 13.0 26.19 22.64 23.0
13b 20.8 33.29 22.45 17.6
34b 32.7 34.64 17.62 25.5
7b-instruct - 31.46 0.04 50.3
13b-instruct - 36.84 0.01 36.5
34b-instruct - 47.37 0.00 45.2
7b-python 13.0 - - -
13b-python 22.1 - - -
34b-python 34.4 - - -
"""
# Table 17, percent of 64; `8000@0.2` is a prompt of 8k tokens with the key at 0.2.
_TABLE_17 = """
key-retrieval/8000@0.0:retrieved key-retrieval/8000@0.2:retrieved \
key-retrieval/8000@0.4:retrieved key-retrieval/16000@0.0:retrieved \
key-retrieval/16000@0.2:retrieved key-retrieval/16000@0.4:retrieved \
key-retrieval/24000@0.0:retrieved key-retrieval/24000@0.2:retrieved \
key-retrieval/24000@0.4:retrieved
7b 100.0 95.3 100.0 54.7 100.0 98.4 3.1 85.9 85.9
13b 100.0 100.0 100.0 100.0 100.0 100.0 100.0 89.1 6.3
34b 76.6 100.0 100.0 95.3 96.9 100.0 81.3 0.0 81.3
7b-instruct 100.0 97.7 100.0 7.0 96.9 96.1 0.0 62.5 54.7
13b-instruct 100.0 100.0 100.0 100.0 100.0 93.8 4.7 84.4 100.0
34b-instruct 92.2 100.0 100.0 68.8 95.3 100.0 46.9 0.0 85.9
"""


def _read(*tables: str) -> dict[str, dict[str, float]]:
    numbers: dict[str, dict[str, float]] = {}
    for table in tables:
        head, *lines = table.strip().splitlines()
        for line in lines:
            model, *cells = line.split()
            for measure, cell in zip(head.split(), cells, strict=True):
                if cell != "-":
                    numbers.setdefault(measure, {})[model] = float(cell)
    return numbers


PUBLISHED = _read(_TABLE_2, _TABLE_3, _TABLE_4, _TABLES_6_13_14, _TABLES_9_12, _TABLE_17)
_SIZES = {"7b": 7e9, "13b": 13e9, "34b": 34e9, "70b": 70e9}


def nearest_model(n_parameters: float, is_instruct: bool) -> str:
    """The released model that is nearest in size, of the same kind (base or instruct)."""
    size = min(_SIZES, key=lambda name: abs(_SIZES[name] - n_parameters))
    return f"{size}-instruct" if is_instruct else size


def published(task: str, metric: str, model: str, group: str = "") -> float | None:
    """The paper's number for a model, in percent; None where it has none."""
    measure = f"{task}/{group}:{metric}" if group else f"{task}:{metric}"
    return PUBLISHED.get(measure, {}).get(model)


def others(task: str, metric: str) -> dict[str, float]:
    """Numbers that the paper quotes for models other than Code Llama, in percent."""
    numbers = PUBLISHED.get(f"{task}:{metric}", {})
    return {
        name: number for name, number in numbers.items() if name[0].isupper() or "cushman" in name
    }
