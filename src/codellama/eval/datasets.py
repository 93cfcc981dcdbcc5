"""Benchmark files: where they are looked for, how they are checked, and how they are read.

A file is known by its name in the data folder and by the SHA-256 of its content (uncompressed, so
that a recompressed copy is the same file). It is taken from `--data`, $CODELLAMA_DATA, a folder
shared/data beside or above the current one, or the cache; what is nowhere is downloaded once from
its official source, where there is one whose content is known.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codellama.artifact import write_file

MAX_BYTES = 1 << 30  # a gzip file of a megabyte can hold a gigabyte of zeros
_GITHUB = "https://raw.githubusercontent.com/"

_TABLE = """
1d49078ba3e2b196b9344535bef34a43021f038fad9561d6ee7c53450609a6a2 humaneval/HumanEval.jsonl.gz
6fffc71ec2f1674372fcc177511f92312f1a27a9eacd8e43255c9f5ee9eca8c8 humaneval-infilling/HumanEval-SingleLineInfilling.jsonl.gz
5b49f312f0a781420a4ae54f5e73176009b9cfc52731e3a0b9be726b451032d1 humaneval-infilling/HumanEval-MultiLineInfilling.jsonl.gz
4f15be2d4a479b504072c64e79702df184010f13bdf75f8b67ce08e054c48e26 humaneval-infilling/HumanEval-RandomSpanInfilling.jsonl.gz
cbb2b36f90311a3a7d844b6361852bb33e3ab11ab3bca2b7e85bfb9bf78c5891 humaneval-infilling/HumanEval-RandomSpanInfillingLight.jsonl.gz
42526ec0e7d5f3ee0b06d6ced98f8c8bae3d76519151bfb3d36f79010645bd7f humanevalplus/HumanEvalPlus.jsonl.gz
78fbba8865b20c5a979cda6e02fd72538e1762e65980af7d1a6e93c3e87e93af humanevalplus/HumanEvalPlus-Mini.jsonl.gz
ccf64ceae9c5403bf50a044cb6d505bfd2a2963ee58338ba268fd65beab92a9f mbpp/mbpp.jsonl.gz
ca95deaa9a01ef0a6f439f88bcf0dd3db3563d22f22aad6cae04ebb9a8d8c8e9 mbpp/sanitized-mbpp.json.gz
48f3283582e753022d0e2203d629ad89e4396545c64187649c3b5a023e5b0ebc multipl-e/humaneval-cpp-reworded.jsonl.gz
99685dd5255f7fcee7e953efb1ada151781897a04d3a19f0c7729cd1937ed5bc multipl-e/humaneval-cs-reworded.jsonl.gz
1002086bcd254e7f24e9d5cc79b16bd2146956aa5ff41089c1d3b31a6f190157 multipl-e/humaneval-java-reworded.jsonl.gz
1c0eb0d4193f17ff42b907e54b8ad95d94d0b76ec713e21c1591f3b8bd0922f6 multipl-e/humaneval-js-reworded.jsonl.gz
b6f8d5b14a6690879987350219e9600880ac66e0657c1ad3d77d7eb25b4d6bfd multipl-e/humaneval-php-reworded.jsonl.gz
e6d328c711df1c502f23e01495068ba663ca7d55e4e4cce4e0c50e14f8ea4f9d multipl-e/humaneval-py-reworded.jsonl.gz
98f8a8cb6d8ed682c32611aa4b37fa439a2c0734cbba5f0c662313b79a2cfb77 multipl-e/humaneval-sh-reworded.jsonl.gz
967c87977ba29dd0cb956c4c18c624c18c3545b29e30cc63cb5ef4f72902625b multipl-e/humaneval-ts-reworded.jsonl.gz
79d34551663250d7c980501e5346f3e5567c1e2d0934cc1ee587e0852bac3803 multipl-e-fim/single-line-infilling.jsonl.gz
5091cc23c717cabf76e533fff9364e568b3d8017ee3ffba6ad78069ffc7e5bd5 apps/apps-train-sample.jsonl.gz
6ce7a6d37e301641f37bcc1351464682ce903d319f006943bc762553f2c0fca5 codexglue/cosqa-dev.jsonl.gz
62a3767c2e19c82ba20740a03e9a6048829a638956c6dd85e9a9b43b57ec98da longbench-code/lcc-sample.jsonl.gz
885df581ea42da46c71fa63bfa31099109ea190745033f26ea1deff65fd52b19 longbench-code/repobench-p-sample.jsonl.gz
26a492838b05f9d030b2f08a5715c6bafecafb601c157da912bf417fd8b0d363 ds1000/ds1000.jsonl.gz
3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14 gsm8k/test.jsonl.gz
17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465 gsm8k/train.jsonl.gz
f9bd9e859cc102cb1f647f1064da7e009be752c416845cf9fa56e6eaae403a7d truthfulqa/TruthfulQA-2021-817.csv.gz
b3799639bc76c939836d587de7d30b48d91012cb34be04806d33106ce06c162a truthfulqa/mc_task-2021-817.json.gz
0e9e95bbb1477383ecdb21c6dc5492ea622ec006d6c19a81ff3347f68623d05c toxigen/toxigen-prompts.jsonl.gz
a863aaf2492e3c911c39f435005abee2eba5f5edabe836e97de110cd83273054 bold/gender_prompt.json.gz
a83ea7cc272971b618231e13bcb5c1d1be5b208c92135c4ffde85be31f8ab4c6 bold/political_ideology_prompt.json.gz
5508012069f20419559417e64d8bb2b8d864ebf8afedd21e5ca564393c291794 bold/profession_prompt.json.gz
200337f6c43b09671e580b1df6aea2cdc0196ee02779260e9881da07029e1cb6 bold/race_prompt.json.gz
633830ea87d569e5476895a93f68b8f686cb0dcae6d67a1091a9247c5c4c931d bold/religious_ideology_prompt.json.gz
11783fb294ed017473ee53c207d71f2161c7672c8d0b037501e78387f801cb5a xstest/xstest_prompts.csv
"""  # noqa: E501
# SHA-256 of the content of each file, read from the file itself.
KNOWN = {name: sha256 for sha256, name in map(str.split, _TABLE.strip().splitlines())}
# Official places of those whose content there is the same, below _GITHUB, by how names begin.
_PLACES = {
    "humaneval/": "openai/human-eval/6d43fb980f9fee3c892a914eda09951f772ad10d/data/",
    "humaneval-infilling/": "openai/human-eval-infilling/"
    "88062ff9859c875d04db115b698ed4b0f0395170/data/",
    "humanevalplus/": "evalplus/humanevalplus_release/200defce9e3429d28ca215b6dd061c0f7f31c18b/",
    "mbpp/mbpp.jsonl": "google-research/google-research/master/mbpp/",
    "gsm8k/": "openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/"
    "grade_school_math/data/",
    "bold/": "amazon-science/bold/3ad652c773f5d1e30d5f6f61657ed934d768ecad/prompts/",
    "xstest/": "paul-rottger/exaggerated-safety/d7bb5bd738c1fcbc36edd83d5e7d1b71a3e2d84d/",
}
_PACKED_THERE = "humaneval"  # the others are not compressed in their place
SOURCES = {
    name: place + Path(name.removesuffix("" if name.startswith(_PACKED_THERE) else ".gz")).name
    for name in KNOWN
    for begin, place in _PLACES.items()
    if name.startswith(begin)
}


@dataclass(frozen=True)
class DataFile:
    """A benchmark file in memory."""

    path: str
    content: bytes
    """Uncompressed."""
    sha256: str
    """Of the content."""

    def rows(self) -> list[dict[str, Any]]:
        """The rows of a JSON lines, JSON list or CSV file.

        Raises:
            ValueError: the content is none of these; names the line.
        """
        text = self.content.decode("utf-8-sig")
        name = self.path.removesuffix(".gz")
        if name.endswith(".csv"):
            return list(csv.DictReader(io.StringIO(text)))
        if name.endswith(".json"):
            return _dictionaries(self.path, json.loads(text))
        rows = []
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except ValueError as error:
                    raise ValueError(f"{self.path}:{number}: not JSON: {error}") from None
        return _dictionaries(self.path, rows)


def data_file(name: str, given: Path | None = None) -> DataFile:
    """Find a benchmark file by its name, check it, and read it.

    Args:
        name: a key of KNOWN.
        given: this file instead, whatever its content; a folder is searched first, with the check.

    Raises:
        ValueError: not found and not to be had, damaged, or other content than the known one.
    """
    if given is not None and not given.is_dir():
        return _read(given)
    expected = KNOWN[name]
    for folder in _folders(given):
        # A file is also found directly in the folder, and uncompressed.
        for place in (name, name.removesuffix(".gz"), Path(name).name):
            if (folder / place).is_file():
                found = _read(folder / place)
                if found.sha256 != expected:
                    raise ValueError(
                        f"{found.path}: content has SHA-256 {found.sha256}, expected {expected}; "
                        "name the file with --data to use it all the same"
                    )
                return found
    return _download(name, SOURCES.get(name, ""), expected)


def _folders(given: Path | None) -> list[Path]:
    named = os.environ.get("CODELLAMA_DATA")
    here = Path.cwd()
    shared = [above / "shared" / "data" for above in (here, *here.parents[:2])]
    return [*([given] if given else []), *([Path(named)] if named else []), *shared, _cache()]


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "codellama" / "data"


def _read(path: Path) -> DataFile:
    """A file, uncompressed; names it where it cannot be read."""
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            with gzip.open(io.BytesIO(content)) as file:
                content = file.read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    if len(content) > MAX_BYTES:
        raise ValueError(f"{path}: more than {MAX_BYTES} bytes when uncompressed")
    return DataFile(str(path), content, hashlib.sha256(content).hexdigest())


def _download(name: str, url: str, expected: str) -> DataFile:
    """Fetch a file into the cache; only the known content is kept."""
    remedy = "give it with --data FILE, or its folder in $CODELLAMA_DATA"
    if not url:
        raise ValueError(f"{name}: not found, and there is no source to download it from; {remedy}")
    try:
        with urllib.request.urlopen(_GITHUB + url, timeout=30) as response:
            raw = response.read(MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(
            f"{name}: not found, and {_GITHUB}{url} cannot be reached ({error}); {remedy}"
        ) from None
    content = raw
    if url.endswith(".gz"):
        try:
            content = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{_GITHUB}{url}: not a whole gzip file: {error}") from None
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise ValueError(f"{_GITHUB}{url}: content has SHA-256 {found}, expected {expected}")
    place = _cache() / name
    place.parent.mkdir(parents=True, exist_ok=True)
    write_file(place, gzip.compress(content, mtime=0) if name.endswith(".gz") else content)
    return DataFile(str(place), content, found)


def _dictionaries(path: str, rows: Any) -> list[dict[str, Any]]:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a list of objects")
    return rows
