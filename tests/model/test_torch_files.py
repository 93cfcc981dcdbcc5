"""Files of torch.save: read without running anything, written as torch writes them."""

import os
import pickle
import zipfile

import pytest
import torch

from codellama.model.torch_files import read_torch_file, torch_file


class Payload:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.randn(50, 40), "b": torch.randn(7).bfloat16()}, path)
    return path


def test_what_we_write_is_what_torch_reads(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(0, 4), "c": torch.randn(70)}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        path = tmp_path / "weights.pth"
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        with torch_file(path, shapes, dtype) as write:
            for name, tensor in tensors.items():
                write(name, tensor)
        for options in ({}, {"mmap": True}):
            read = torch.load(path, weights_only=True, **options)
            assert list(read) == list(tensors)
            assert all(torch.equal(read[name], tensors[name].to(dtype)) for name in tensors)
        assert zipfile.ZipFile(path).testzip() is None  # the checksums are right
        again = read_torch_file(path)
        assert all(torch.equal(again[name], read[name]) for name in tensors)
        theirs = tmp_path / "theirs.pth"
        torch.save({name: tensor.to(dtype) for name, tensor in tensors.items()}, theirs)
        assert data_offsets(path) == {0}
        assert data_offsets(theirs) == {0}


def data_offsets(path):
    """Where tensors begin, modulo torch's alignment."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        offsets = set()
        for entry in archive.infolist():
            if "/data/" in entry.filename and entry.file_size:
                file.seek(entry.header_offset + 26)
                sizes = file.read(4)
                start = (
                    30 + int.from_bytes(sizes[:2], "little") + int.from_bytes(sizes[2:], "little")
                )
                offsets.add((entry.header_offset + start) % 64)
    return offsets


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_is_refused_and_never_runs(tmp_path, legacy):
    canary = tmp_path / "canary"
    path = tmp_path / "evil.pth"
    content = {"a": torch.ones(2), "b": Payload(canary)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(
        ValueError, match=r"evil\.pth: .*(refused|not a file of torch\.save)"
    ) as error:
        read_torch_file(path)
    assert not canary.exists()
    assert "\n" not in str(error.value)
    path.write_bytes(pickle.dumps(Payload(canary)))
    with pytest.raises(ValueError, match="not a file of torch"):
        read_torch_file(path)
    assert not canary.exists()


@pytest.mark.parametrize("kept", [0, 1, 10, 100, 1000, 5000, 8000, -1, -10, -100])
def test_truncated(file, kept):
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"weights\.pth: (damaged|refused)") as error:
        read_torch_file(file)
    assert "\n" not in str(error.value)


def test_missing(tmp_path):
    with pytest.raises(ValueError, match=r"none\.pth: missing"):
        read_torch_file(tmp_path / "none.pth")


def test_a_compressed_archive(file, tmp_path):
    packed = tmp_path / "packed.pth"
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(ValueError, match="is compressed"):
        read_torch_file(packed)


@pytest.mark.parametrize(
    "content",
    [
        [torch.ones(2)],
        torch.ones(2),
        {"a": {"b": torch.ones(2)}},
        {"a": 3},
        {3: torch.ones(2)},
        {"a": torch.ones(1).expand(1000, 1000)},
        {"a": torch.ones(30, 40).T},
        {"a": torch.ones(3).to_sparse()},
        {"a": torch.ones(3, device="meta")},
    ],
)
def test_content_that_is_not_weights(tmp_path, content):
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=r"odd\.pth"):
        read_torch_file(tmp_path / "odd.pth")


def test_many_names_for_the_same_bytes(tmp_path):
    tensor = torch.ones(1000)
    torch.save({str(i): tensor for i in range(100)}, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match="overlaps"):
        read_torch_file(tmp_path / "odd.pth")
