"""Any folder of four idx files: read whole, or refused with the file and what is wrong with it."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.datasets import FashionMNIST

from loop.config import Config, InputError
from loop.data import load
from loop.idx import read_idx, read_idx_split


def idx(*shape: int, content: bytes | None = None) -> bytes:
    """An idx file of unsigned bytes."""
    size = 1
    for n in shape:
        size *= n
    return struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape) + (
        bytes(size) if content is None else content
    )


GOOD = {
    "train-images-idx3-ubyte": idx(3, 28, 28),
    "train-labels-idx1-ubyte": idx(3, content=b"\x00\x09\x05"),
    "t10k-images-idx3-ubyte": idx(2, 28, 28),
    "t10k-labels-idx1-ubyte": idx(2, content=b"\x01\x02"),
}


def folder_with(path: Path, **changes: bytes | None) -> Path:
    """The good files, some replaced or (None) left out; a keyword is the file's first two words."""
    for name, content in GOOD.items():
        content = changes.get("_".join(name.split("-")[:2]), content)
        if content is not None:
            (path / name).write_bytes(content)
    return path


def test_fashion_mnist_is_read_as_torchvision_reads_it() -> None:
    for ours, training in zip(load(Config()), (True, False), strict=True):
        theirs = FashionMNIST("data", train=training)
        assert torch.equal(ours.images, theirs.data)
        assert torch.equal(ours.labels, theirs.targets)


def test_a_good_folder_is_read_plain_and_gz(tmp_path: Path) -> None:
    for name, content in GOOD.items():
        packed = name.startswith("train")
        (tmp_path / f"{name}{'.gz' if packed else ''}").write_bytes(gzip.compress(content) if packed else content)
    train, test = load(Config(dataset=str(tmp_path), train_examples=2))
    assert train.images.shape == (2, 28, 28)
    assert train.labels.tolist() == [0, 9]
    assert test.labels.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"train_images": None}, "no file train-images-idx3-ubyte or train-images-idx3-ubyte.gz"),
        ({"train_images": b""}, "train-images-idx3-ubyte: not an idx file"),
        ({"train_images": idx(3, 28)}, "train-images-idx3-ubyte: not an idx file of 3 dimension"),
        ({"train_images": idx(3, 28, 28)[:-1]}, "holds 2351 bytes of data; its header says 2352"),
        ({"train_images": idx(3, 28, 28) + b"x"}, "holds 2353 bytes"),
        ({"train_images": idx(3, 32, 32)}, "32 x 32; the nets take 28 x 28"),
        ({"train_labels": idx(2)}, "3 train images, but 2 labels"),
        ({"train_labels": idx(3, content=b"\x00\x0a\x05")}, "a train label is 10; the nets have 10 classes"),
        ({"t10k_images": idx(0, 28, 28), "t10k_labels": idx(0)}, "the t10k files hold no examples"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, changes: dict[str, bytes | None], complaint: str) -> None:
    folder = folder_with(tmp_path, **changes)
    with pytest.raises(InputError, match=complaint):
        for prefix in ("train", "t10k"):
            read_idx_split(folder, prefix)


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, train_images=None)
    (folder / "train-images-idx3-ubyte").mkdir()
    with pytest.raises(InputError, match=r"train-images-idx3-ubyte: cannot be read: .*Is a directory"):
        load(Config(dataset=str(folder)))


def test_a_torn_gz_is_named(tmp_path: Path) -> None:
    torn = gzip.compress(GOOD["train-images-idx3-ubyte"])[:-5]
    folder = folder_with(tmp_path, train_images=None)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(torn)
    with pytest.raises(InputError, match=r"train-images-idx3-ubyte\.gz: cannot be read"):
        read_idx_split(folder, "train")


@given(content=st.binary(max_size=64) | st.binary(max_size=48).map(lambda tail: bytes([0, 0, 8, 1]) + tail))
def test_no_bytes_are_read_wrongly_or_end_in_another_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "f").write_bytes(content)
    try:
        (count,), data = read_idx(folder, "f", 1)
    except InputError:
        return
    assert idx(count, content=data) == content
