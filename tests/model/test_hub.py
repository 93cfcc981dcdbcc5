"""Downloads, with the hub's library replaced: what is asked for, and what a user is told."""

from fnmatch import fnmatch
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

from codellama.model.hub import download, is_hub_name
from codellama.weights import load

SMALL_FILES = ["config.json", "tokenizer.model", "README.md", "tokenizer.json", "USE_POLICY.md"]


@pytest.mark.parametrize(
    ("weights", "fetched"),
    [
        (["model.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
        (
            [
                "model-00001-of-00002.safetensors",
                "model.safetensors.index.json",
                "pytorch_model.bin",
            ],
            ["model-00001-of-00002.safetensors", "model.safetensors.index.json"],
        ),
        (["pytorch_model.bin", "model.onnx", "old/model.safetensors"], ["pytorch_model.bin"]),
        (["consolidated.00.pth", "params.json"], ["consolidated.00.pth", "params.json"]),
    ],
)
def test_only_what_is_needed_is_fetched(tmp_path, monkeypatch, weights, fetched):
    repository = [*SMALL_FILES, *weights]

    def snapshot(name, allow_patterns):
        assert name == "codellama/CodeLlama-7b-hf"
        for file in repository:
            if any(fnmatch(file, pattern) for pattern in allow_patterns):
                (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert download("codellama/CodeLlama-7b-hf") == tmp_path
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {"config.json", "tokenizer.model", *fetched}


def failing(error):
    def snapshot(name, allow_patterns):
        raise error

    return snapshot


class Refused(errors.HfHubHTTPError):
    def __init__(self, status):
        OSError.__init__(self)
        self._status = status

    @property
    def response(self):
        return SimpleNamespace(status_code=self._status)

    @response.setter
    def response(self, value):
        pass


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.LocalEntryNotFoundError("x"), "cannot be reached"),
        (Refused(404), "hub: not found"),
        (Refused(401), "no such model, or no access"),
        (Refused(500), "it answered 500"),
        (errors.HFValidationError("bad"), "no name of a model: bad"),
        (OSError(28, "No space left on device"), "broke off .*No space left.*continues it"),
        (errors.HTTPError("reset"), "broke off .*reset"),
    ],
)
def test_what_went_wrong_is_one_line(monkeypatch, error, message):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", failing(error))
    with pytest.raises(ValueError, match=f"codellama/none: .*{message}") as caught:
        load("codellama/none")
    assert "\n" not in str(caught.value)


def test_a_model_without_weights(tmp_path, monkeypatch):
    snapshot = lambda name, allow_patterns: str(tmp_path)  # noqa: E731
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(ValueError, match="no weights of a known format"):
        download("codellama/none")


def test_names():
    assert is_hub_name("codellama/CodeLlama-7b-hf")
    for path in ("codellama", "a/b/c", "./a", "../a", "/a/b", "a/", "", "a b/c"):
        assert not is_hub_name(path)
