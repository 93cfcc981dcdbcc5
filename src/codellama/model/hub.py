"""Checkpoints of the Hugging Face hub: only the files that are needed, into its usual cache.

A download that was interrupted goes on where it stopped; progress goes to standard error.
"""

from __future__ import annotations

import re
from pathlib import Path

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SMALL_FILES = ["config.json", "generation_config.json", "tokenizer.model", "tokenizer_config.json"]
_META_FILES = ["params.json", "consolidated.*.pth"]


def is_hub_name(text: str) -> bool:
    """Whether a text has the form of a hub name, such as codellama/CodeLlama-7b-hf."""
    return _NAME.fullmatch(text) is not None


def needed_patterns(files: list[str]) -> list[str]:
    """The files of a repository to download, as patterns: one kind of weights, not all."""
    patterns = list(_SMALL_FILES)
    if any(name.endswith(".safetensors") for name in files):
        return [*patterns, "*.safetensors", "model.safetensors.index.json"]
    if any(re.fullmatch(r"pytorch_model.*\.bin", name) for name in files):
        return [*patterns, "pytorch_model*.bin", "pytorch_model.bin.index.json"]
    return patterns + _META_FILES


def download(name: str) -> Path:
    """Download a model, or what is missing of it, and return its folder.

    Raises:
        ValueError: there is no such model, no access to it, or no connection and no copy here.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    from huggingface_hub.errors import OfflineModeIsEnabled as Offline

    try:
        import httpx

        connection_errors: tuple[type[Exception], ...] = (OSError, Offline, httpx.HTTPError)
    except (
        ImportError
    ):  # older versions of the hub's library use requests, whose errors are OSErrors
        connection_errors = (OSError, Offline)
    try:
        files = HfApi().list_repo_files(name)
        return Path(snapshot_download(name, allow_patterns=needed_patterns(files)))
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        reason = {
            401: "no such model, or no access to it",
            403: "no access to it",
            404: "not found",
        }
        if status in reason:
            raise ValueError(f"{name}: {reason[status]} on the Hugging Face hub") from None
        problem = f"the hub answered {status}"
    except connection_errors as error:
        problem = f"the hub cannot be reached ({type(error).__name__})"
    try:  # an earlier download
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, OSError):
        raise ValueError(
            f"{name}: no such file or folder here, and as a name of the Hugging Face hub it cannot "
            f"be downloaded: {problem}"
        ) from None
