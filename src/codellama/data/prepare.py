"""Prepare: from the sources that a recipe names to a corpus folder.

    list units -> stage each (locally or on Ray) -> choose what stays -> shuffle into shards

Only the choice looks at all documents at once, and only at their keys and signatures. What was
staged stays. The same inputs give the same bytes, whatever the number of processes.

In: a `Recipe`. Out: `recipe.corpus_dir`, in the format that `corpus` describes.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import daft
from daft import col
from daft.exceptions import DaftCoreException
from rich.console import Console
from rich.progress import Progress

from codellama.artifact import new_folder, only_process, read_manifest, write_file, write_manifest
from codellama.data.benchmarks import benchmark_files
from codellama.data.corpus import KIND, SPLITS, repositories_of
from codellama.data.data_card import write_card
from codellama.data.decontaminate import BlockList, build_block_list
from codellama.data.listing import Listing, list_sources
from codellama.data.repository import write_repositories
from codellama.data.selection import Selection, Staged, count_in, select, write_signatures
from codellama.data.shuffle import write_shards
from codellama.data.split import TRAIN
from codellama.data.staging import VERSION, Settings, stage_json, stage_unit, staged_key
from codellama.recipe import Benchmarks, Corpus, Recipe, Source

IN_PROCESS_BYTES = 8_000_000  # less is done before worker processes have started (2 s)
ATTEMPTS = 3  # without progress between them: a node of a cluster may go at any time


def prepare_corpus(recipe: Recipe, ray: str | None = None) -> Path:
    """Write the corpus of a recipe and return its folder; a corpus that is up to date is kept.

    ray: address of a Ray cluster whose nodes all see the work folder and the sources; `auto` is the
    one that runs on this machine. None works in processes of this machine.

    Raises:
        ValueError: a source is missing, nothing is left after the filters, or another process
            is writing the same corpus.
        OSError: the corpus could not be written; what was there before is untouched.
    """
    folder = recipe.corpus_dir.absolute()
    console = Console(stderr=True)
    with only_process(folder.parent, "is preparing a corpus here"):
        with console.status("listing sources …"):
            work = _plan(recipe, build=True)
        state = _state(work)
        if _is_current(folder, work, state):
            print(f"{folder}: up to date, nothing to do", file=sys.stderr)
            return folder
        try:
            _stage(work, console, ray)
            with new_folder(folder) as new:
                manifest = _build(work, new, console)
                write_manifest(new, KIND, **manifest)
                write_card(new)
            if recipe.corpus.repositories:
                write_repositories(folder, repositories_of(folder))
            write_file(work.folder / "current.json", json.dumps(state))
            _remove_others(work)
        except OSError as error:
            raise OSError(f"{folder}: could not write the corpus: {error}") from error
    _report(manifest, folder)
    return folder


def plan_corpus(recipe: Recipe) -> list[dict[str, Any]]:
    """For each source what `prepare` would read, and what of it was staged before.

    Nothing is fetched and nothing is written; files of remote sources are listed.
    """
    work = _plan(recipe, build=False)
    rows: list[dict[str, Any]] = []
    gone = work.listing.unavailable.items()
    for source in recipe.corpus.sources:
        own = [s for s in work.staged if s.unit.source == source.name]
        missing = [s for s in own if not s.path.exists()]
        rows.append(
            {
                "source": source.name,
                "kind": source.kind,
                "n_units": len(own),
                "n_bytes": sum(s.unit.n_bytes for s in own),
                "to_read_bytes": sum(s.unit.n_bytes for s in missing),
                "n_other_files": work.listing.n_other[source.name],
                "unavailable": {n: why for n, why in gone if n.split("/")[0] == source.name},
            }
        )
    return rows


class _Work(NamedTuple):
    """What is to be done for a corpus."""

    corpus: Corpus
    listing: Listing
    settings: Settings
    folder: Path
    """Of the staged files."""
    staged: list[Staged]
    """For each unit the file that it becomes."""

    @property
    def sources(self) -> dict[str, Source]:
        """By name, in the order of the recipe."""
        return {source.name: source for source in self.corpus.sources}


def _plan(recipe: Recipe, build: bool) -> _Work:
    """List the units; with `build`, wheels are fetched and the block list is made."""
    corpus = recipe.corpus
    listing = list_sources(corpus.sources, recipe.work / "sources", fetch=build)
    folder = recipe.corpus_dir.absolute().with_name("staged")
    if build:
        folder.mkdir(exist_ok=True)
    settings = Settings(
        filters=corpus.filters,
        near_duplicates=corpus.near_duplicates,
        block_list=str(_block_list(corpus.benchmarks, folder, build)) if corpus.benchmarks else "",
        cut_hits=bool(corpus.benchmarks and corpus.benchmarks.action == "cut"),
        keep_rejects=corpus.keep_rejects,
    )
    places = {source.name: (number, source) for number, source in enumerate(corpus.sources)}
    staged = []
    for unit in listing.units:
        number, source = places[unit.source]
        path = folder / f"{staged_key(unit, source, settings)}.parquet"
        staged.append(Staged(path, unit, number))
    return _Work(corpus, listing, settings, folder, staged)


def _block_list(benchmarks: Benchmarks, folder: Path, build: bool) -> Path:
    """The file of the passages to look for, named after its content."""
    settings = benchmarks.model_dump_json(exclude={"paths"})
    digest = hashlib.sha256(f"{VERSION} {settings}".encode())
    for file in benchmark_files(benchmarks.paths):
        digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    path = folder / f"benchmarks-{digest.hexdigest()[:16]}.npz"
    if build and not path.exists():
        temporary = path.with_suffix(".tmp")
        build_block_list(benchmarks).save(temporary)
        temporary.replace(path)
    return path


def _state(work: _Work) -> dict[str, Any]:
    """Everything that decides what the corpus is: equal states give equal corpora."""
    against = {
        path: read_manifest(Path(path), KIND).get("fingerprint", "") for path in work.corpus.against
    }
    return {
        "config": work.corpus.model_dump(mode="json"),
        "unavailable": dict(work.listing.unavailable),
        "against": against,
        "staged": hashlib.sha256("".join(s.path.name for s in work.staged).encode()).hexdigest(),
    }


def _is_current(folder: Path, work: _Work, state: dict[str, Any]) -> bool:
    """Whether the folder holds the corpus of this state, all shards present."""
    try:
        manifest = read_manifest(folder, KIND)
        before = json.loads((work.folder / "current.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    sizes = {shard["file"]: shard["file_bytes"] for shard in manifest.get("shards", [])}
    there = {path.name: path.stat().st_size for path in folder.glob("*-*.parquet")}
    there_too = not work.corpus.repositories or repositories_of(folder).is_dir()
    are_staged = all(s.path.exists() for s in work.staged)
    return before == state and sizes == there and there_too and are_staged


def _stage(work: _Work, console: Console, ray: str | None) -> None:
    """Make the staged files that are missing; those that were made survive an interruption."""
    staged = work.staged
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("reading and filtering", total=len(staged))
        failures, error = 0, None
        while missing := list({s.path: s for s in staged if not s.path.exists()}.values()):
            if failures >= ATTEMPTS:
                raise OSError(f"{len(missing)} units could not be staged: {error}")
            progress.update(task, completed=len(staged) - len(missing))
            try:
                for _ in _run(missing, work, ray):
                    progress.advance(task)
            except (RuntimeError, DaftCoreException) as failure:
                # A worker or a node died. What it had finished is there.
                error = failure
            n_left = sum(not s.path.exists() for s in missing)
            failures = 0 if n_left < len(missing) else failures + 1


def _run(missing: list[Staged], work: _Work, ray: str | None) -> Iterator[None]:
    """Stage units, in this process if it is little, else in processes or on a cluster."""
    sources, settings = work.sources, work.settings
    if not ray and sum(s.unit.n_bytes for s in missing) < IN_PROCESS_BYTES:
        for s in missing:
            stage_unit(s.unit, sources[s.unit.source], settings, work.folder, s.path.stem)
            yield
        return
    # Large units first: the last one decides when all are done.
    missing = sorted(missing, key=lambda s: -s.unit.n_bytes)
    kept = {name: source.model_dump(mode="json") for name, source in sources.items()}
    how = settings.model_dump(mode="json"), str(work.folder)
    tasks = [json.dumps((asdict(s.unit), kept[s.unit.source], *how, s.path.stem)) for s in missing]
    if ray:
        yield from _on_ray(ray, tasks)
        return
    stage = daft.func(stage_json, return_dtype=daft.DataType.string(), use_process=True)
    frame, done = daft.from_pydict({"task": tasks}), cast(Any, stage)(col("task"))
    for _ in frame.into_batches(1).select(done).to_arrow_iter():
        yield


def _on_ray(address: str, waiting: list[str]) -> Iterator[None]:
    """Stage units as tasks of a Ray cluster, which starts those of a lost node again.

    Plain tasks, for Daft's runner has one Python process on each node, whatever its cores.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]
        from ray.exceptions import RayError  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError("--ray: Ray is not installed; install codellama[ray]") from None
    if not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False)
        except (ConnectionError, RuntimeError) as error:
            raise ValueError(f"--ray {address}: no cluster answers: {error}") from None
    stage = ray.remote(max_retries=ATTEMPTS)(stage_json)
    tasks = [stage.remote(task) for task in waiting]
    while tasks:
        done, tasks = ray.wait(tasks)
        try:
            ray.get(done)
        except RayError as error:
            raise RuntimeError(str(error).strip().splitlines()[-1]) from None
        yield


def _build(work: _Work, folder: Path, console: Console) -> dict[str, Any]:
    """Write shards and signatures into the folder and return what the manifest says of it all."""
    if not work.listing.units:
        missing = ", ".join(work.listing.unavailable) or "nothing"
        raise ValueError(
            f"the corpus is empty: no wanted files in its sources (not available: {missing})"
        )
    with console.status("looking for duplicates …"):
        selection = select(work.corpus, work.staged, folder)
    drops = selection.drop_counts()
    if not (selection.split >= 0).any():
        counts = ", ".join(f"{reason}: {drop['n']}" for reason, drop in drops.items())
        n_files = selection.n_rows
        raise ValueError(f"the corpus is empty: of {n_files} files none was kept ({counts or '-'})")
    if not (selection.split == TRAIN).any():
        raise ValueError("corpus.hold_out names every package: nothing is left to train on")
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("writing shards", total=selection.n_rows)
        advance = partial(progress.advance, task)
        shards = write_shards(selection.parts, selection.kept_bytes, folder, advance)
    write_signatures(selection, folder)
    return _contents(work, selection, shards) | {"dropped": drops}


def _contents(work: _Work, selection: Selection, shards: list[dict[str, Any]]) -> dict[str, Any]:
    """The manifest: what went in, counts, shards, and a fingerprint over the shards."""
    fingerprint = hashlib.sha256("".join(shard["sha256"] for shard in shards).encode())
    manifest = {
        "python": ".".join(platform.python_version_tuple()[:2]),  # decides what parses
        "config": work.corpus.model_dump(mode="json"),
        "inputs": {
            "n_files": selection.n_rows,
            "sha256": selection.inputs_digest(),
            "archives": sorted(work.listing.archives),
            "unavailable": dict(sorted(work.listing.unavailable.items())),
            "n_other_files": {
                name: work.listing.n_other[name] + selection.n_other[name] for name in work.sources
            },
        },
        **selection.counts(),
        "shards": shards,
        "fingerprint": fingerprint.hexdigest(),
    }
    if block_list := work.settings.block_list:
        known = BlockList.load(Path(block_list)).benchmarks
        hits = selection.benchmark_hits()
        manifest["benchmarks"] = {
            name: facts | {"n_documents_hit": hits.get(name, 0)} for name, facts in known.items()
        }
    return manifest


def _remove_others(work: _Work) -> None:
    """Delete staged files that belong to nothing, or are to be made again by the next run."""
    wanted = {s.path.name for s in work.staged if not count_in(s.path, "n_unreached")}
    wanted |= {Path(work.settings.block_list).name, "current.json"}
    for path in work.folder.iterdir():
        if path.name not in wanted:
            path.unlink()


def _report(manifest: dict[str, Any], folder: Path) -> None:
    """What was kept and what was dropped, in a few lines on standard error."""
    for name in SPLITS:
        documents, n_bytes = manifest["n_documents"][name], manifest["n_bytes"][name]
        print(f"{name}: {documents} documents, {n_bytes / 1e6:.1f} MB", file=sys.stderr)
    for reason, drop in manifest["dropped"].items():
        print(f"dropped, {reason}: {drop['n']}", file=sys.stderr)
    if missing := manifest["inputs"]["unavailable"]:
        print(f"not available: {', '.join(missing)}", file=sys.stderr)
    print(f"wrote {folder}", file=sys.stderr)
