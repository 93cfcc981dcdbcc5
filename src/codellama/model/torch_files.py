"""Files of `torch.save`: Meta's consolidated.NN.pth and Hugging Face's older pytorch_model.bin.

Such a file is a zip archive with a pickle in it, so it is read with `weights_only=True`, which
builds tensors and plain containers and refuses everything else without running it; and only after
a look at the archive's directory, so that neither packed data nor wrong sizes can ask for memory.
Old files that are not zip archives are refused. Writing streams one tensor at a time.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._utils import _rebuild_tensor_v2

_MAX_PICKLE_BYTES = 16 << 20  # the directory of tensors; 100 kB for the 70B model
_ALIGNMENT = 64  # of each tensor in the archive, as torch.save writes it
# What damaged bytes make the reader of zip archives and the restricted unpickler raise.
_DAMAGE = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError),
    *(RuntimeError, TypeError, ValueError, pickle.UnpicklingError, struct.error),
    zipfile.BadZipFile,
)


def read_torch_file(path: Path) -> dict[str, Tensor]:
    """Map the tensors of a file, by name.

    Raises:
        ValueError: missing, damaged, or holds anything but floating-point tensors by name.
    """
    try:
        n_bytes = path.stat().st_size
        _check_archive(path, n_bytes)
    except FileNotFoundError:
        raise ValueError(f"{path}: missing") from None
    except _DAMAGE as error:
        raise ValueError(
            f"{path}: damaged or not a file of torch.save (a zip archive): {_line(error)}"
        ) from None
    try:
        values = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except _DAMAGE as error:
        raise ValueError(
            f"{path}: refused: damaged, or it holds objects other than tensors, "
            f"which could run code: {_line(error)}"
        ) from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds a {type(values).__name__}, not tensors by name")
    total = 0
    for name, tensor in values.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{path}: entry {str(name)[:80]!r} is not a tensor")
        if tensor.layout is not torch.strided or tensor.device.type != "cpu":
            raise ValueError(f"{path}: tensor {name!r} is not a plain tensor")
        # Names are enough to make a huge tensor of a small file: a stride of zero.
        total += tensor.numel() * tensor.element_size()
        if total > n_bytes or not tensor.is_contiguous():
            raise ValueError(f"{path}: tensor {name!r} overlaps itself or another one")
    return {name: tensor.detach() for name, tensor in values.items()}


def _check_archive(path: Path, n_bytes: int) -> None:
    """Refuse an archive that is compressed, larger inside than outside, or cut short."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        total = 0
        for entry in entries:
            total += entry.file_size
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise ValueError(f"entry {entry.filename!r} is compressed")
            if entry.header_offset + entry.file_size > n_bytes or total > n_bytes:
                raise ValueError(f"entry {entry.filename!r} is larger than the file")
            if entry.filename.endswith(".pkl") and entry.file_size > _MAX_PICKLE_BYTES:
                raise ValueError(f"entry {entry.filename!r} is too large")
            if entry.filename.rpartition("/")[2] == "constants.pkl":
                raise ValueError("a TorchScript program, not weights")


def _line(error: BaseException) -> str:
    """The first line of an error's message; torch adds pages of advice."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


class _Storage:
    """Stands for the bytes of one tensor while the directory of the file is written."""

    def __init__(self, key: str, dtype: torch.dtype, n_values: int) -> None:
        self.key, self.dtype, self.n_values = key, dtype, n_values


class _Entry:
    """Stands for a tensor; unpickled, it becomes one."""

    def __init__(self, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self.storage, self.shape = _Storage(key, dtype, math.prod(shape)), shape

    def __reduce__(self) -> tuple[Any, ...]:
        strides = tuple(math.prod(self.shape[i + 1 :]) for i in range(len(self.shape)))
        arguments = (self.storage, 0, self.shape, strides, False, OrderedDict())
        return _rebuild_tensor_v2, arguments


class _Pickler(pickle.Pickler):
    """Writes storages as references to entries of the archive, as torch.save does."""

    def persistent_id(self, obj: Any) -> tuple[Any, ...] | None:
        """Return torch's reference to a storage; other objects are pickled as they are."""
        if not isinstance(obj, _Storage):
            return None
        kind = {
            torch.bfloat16: torch.BFloat16Storage,
            torch.float16: torch.HalfStorage,
            torch.float32: torch.FloatStorage,
        }[obj.dtype]
        return "storage", kind, obj.key, "cpu", obj.n_values


@contextmanager
def torch_file(
    path: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype
) -> Iterator[Callable[[str, Tensor], None]]:
    """Write what `torch.save(dict)` would, one tensor at a time.

    Yields:
        A function that writes the tensor of a name; to be called once for each of `shapes`.

    Raises:
        OSError: the file cannot be written.
    """
    keys = {name: str(i) for i, name in enumerate(shapes)}
    directory = io.BytesIO()
    entries = {name: _Entry(keys[name], dtype, shape) for name, shape in shapes.items()}
    _Pickler(directory, protocol=2).dump(entries)
    root = path.stem
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, f"{root}/data.pkl", directory.getvalue())
        _add(archive, f"{root}/byteorder", b"little")

        def write(name: str, tensor: Tensor) -> None:
            assert tuple(tensor.shape) == shapes[name]
            _add(archive, f"{root}/data/{keys.pop(name)}", as_bytes(tensor.to(dtype)))

        yield write
        assert not keys
        _add(archive, f"{root}/version", b"3\n")


def _add(archive: zipfile.ZipFile, name: str, data: bytes | memoryview) -> None:
    """Add an uncompressed entry whose data begins at a multiple of the alignment."""
    entry = zipfile.ZipInfo(name)
    entry.file_size = len(data)
    assert archive.fp is not None
    # The local header has 30 bytes, the name, and an extra field with a header of 4 bytes.
    missing = -(archive.fp.tell() + 30 + len(name) + 4) % _ALIGNMENT
    entry.extra = b"FB" + struct.pack("<H", missing) + b"\0" * missing
    with archive.open(entry, "w") as file:
        file.write(data)


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, without a copy where it is contiguous."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data
