"""The same corpus from a Ray cluster, one of whose nodes is killed in the middle of its work."""

import os
import subprocess
import sys
import sysconfig
import time
import zipfile
from pathlib import Path

import pytest
from trees import make_recipe

from codellama.data.prepare import prepare_corpus

pytestmark = pytest.mark.slow
pytest.importorskip("ray", reason="Ray is not installed; it is the extra `ray`")


def write_archives(folder: Path, n_archives: int) -> None:
    """Real modules, some hundred kB in each archive."""
    folder.mkdir()
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    for number in range(n_archives):
        with zipfile.ZipFile(folder / f"a{number:02}.zip", "w") as archive:
            archive.writestr("LICENSE", "Apache License, Version 2.0")
            for file in files[number::n_archives][:5]:
                archive.write(file, file.name)


def digests(corpus: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in corpus.iterdir() if path.name != "README.md"}


def wait_until(condition: object, process: subprocess.Popen, timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert process.poll() is None, "the command ended too early"
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_cluster_that_loses_a_node(tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    write_archives(tmp_path / "archives", 24)
    source = {"name": "code", "kind": "archive", "path": str(tmp_path / "archives")}
    settings = {"near_duplicates": {}, "filters": {"redact": True}}
    local = prepare_corpus(make_recipe(tmp_path / "local", [source], **settings))
    recipe = make_recipe(tmp_path / "remote", [source], **settings)
    command = (
        "import sys; from codellama.recipe import Recipe; from codellama.data.prepare import *; "
        "prepare_corpus(Recipe.model_validate_json(sys.argv[1]), 'auto')"
    )
    node_options = {"num_cpus": 1, "object_store_memory": 100_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node_options)
    try:
        other = cluster.add_node(num_cpus=1, object_store_memory=100_000_000)
        cluster.wait_for_nodes()
        process = subprocess.Popen(
            [sys.executable, "-c", command, recipe.to_json()],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"RAY_ADDRESS": cluster.address},
        )
        staged, workers = tmp_path / "remote/staged", set[str]()

        def both_work() -> bool:
            workers.update(path.name.split(".")[2] for path in staged.glob(".*.tmp"))
            return len(workers) > 1 and len(list(staged.glob("*.parquet"))) > 3

        wait_until(both_work, process, 1500)
        cluster.remove_node(other, allow_graceful=False)
        n_done = len(list(staged.glob("*.parquet")))
        assert n_done < 20, "nothing was left for the node that stays"
        _, errors = process.communicate(timeout=1500)
        assert process.returncode == 0, errors[-3000:]
    finally:
        cluster.shutdown()
    assert digests(recipe.corpus_dir) == digests(local)
    assert not list(staged.glob(".*.tmp"))
