"""Checkpoints of the Hugging Face hub: only the files that are needed, into its usual cache.

A download that was interrupted goes on where it stopped; progress goes to standard error.
"""

from __future__ import annotations

import re
from pathlib import Path

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SMALL_FILES = ["config.json", "generation_config.json", "tokenizer.model", "tokenizer_config.json"]
# One kind of weights is enough; the first that a repository has.
_WEIGHTS = (
    ("model*.safetensors", "model.safetensors.index.json"),
    ("pytorch_model*.bin", "pytorch_model.bin.index.json"),
    ("consolidated.*.pth", "params.json"),
)


def is_hub_name(text: str) -> bool:
    """Whether a text has the form of a hub name, such as codellama/CodeLlama-7b-hf."""
    return _NAME.fullmatch(text) is not None


def download(name: str) -> Path:
    """Download a model, or what is missing of it, and return its folder.

    Raises:
        ValueError: there is no such model, no access to it, or no connection and no copy here.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        HTTPError,  # pyright: ignore[reportPrivateImportUsage]  (of whichever HTTP library it uses)
        LocalEntryNotFoundError,
    )

    try:
        # Without a connection these return what an earlier download left.
        folder = Path(snapshot_download(name, allow_patterns=_SMALL_FILES))
        for pattern, index in _WEIGHTS:
            snapshot_download(name, allow_patterns=[pattern, index])
            if any(folder.glob(pattern)):
                return folder
    except LocalEntryNotFoundError:
        raise ValueError(
            f"{name}: no such file or folder here, and the Hugging Face hub, where a model may "
            "have this name, cannot be reached; connect, or give the folder of a download"
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        known = {401: "no such model, or no access to it", 403: "no access to it", 404: "not found"}
        reason = known.get(status or 0, f"it answered {status}")
        raise ValueError(f"{name}: Hugging Face hub: {reason}") from None
    except HFValidationError as error:
        raise ValueError(
            f"{name}: no such file or folder, and no name of a model: {error}"
        ) from None
    except (OSError, HTTPError) as error:
        raise ValueError(
            f"{name}: the download broke off ({type(error).__name__}: {error}); "
            "the same command continues it"
        ) from None
    raise ValueError(f"{name}: this model of the hub has no weights of a known format")
