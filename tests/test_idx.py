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
from loop.idx import read_idx, read_set


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


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"train_images": None},
            "no files could be the train images, a name with 'train' and 'images'; there is: t10k-im",
        ),
        ({"train_images": b""}, "train-images-idx3-ubyte: not an idx file of unsigned bytes in 3 dimension"),
        ({"train_images": idx(3, 28)}, r"holds unsigned bytes in 2 dimension\(s\); wanted are unsigned bytes in 3"),
        (
            {"train_labels": b"\0\0\x0c\x02" + bytes(99)},
            r"holds 32-bit integers in 2 dimension\(s\); wanted are unsigned",
        ),
        (
            {"train_images": gzip.compress(idx(3, 28, 28))[:-5]},
            "images-idx3-ubyte: cannot be read: .*: fetch it again$",
        ),
        ({"train_images": idx(3, 28, 28)[:-1]}, "holds 2351 bytes of data; its header says 2352"),
        ({"train_images": idx(3, 28, 28) + b"x"}, "holds 2353 bytes"),
        ({"train_images": idx(3, 32, 32)}, "images of 32 x 32; the nets take 28 x 28"),
        ({"train_labels": idx(2)}, "train-labels-idx1-ubyte: 2 labels for 3 images"),
        ({"t10k_images": idx(0, 28, 28), "t10k_labels": idx(0)}, "t10k-labels-idx1-ubyte: no examples"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, changes: dict[str, bytes | None], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        read_set(folder_with(tmp_path, **changes))


@pytest.mark.parametrize(
    ("of_train", "of_test"),
    [
        ("train-{}.idx3-ubyte", "t10k-{}.idx3-ubyte"),
        ("train-{0}-ubyte/train-{0}-ubyte", "t10k-{0}-ubyte/t10k-{0}-ubyte"),
        ("set/raw/TRAIN-{}-IDX-UBYTE.GZ", "set/raw/TEST-{}-IDX-UBYTE.GZ"),
        ("emnist-letters-train-{}-idx-ubyte", "emnist-letters-test-{}-idx-ubyte"),
        ("qmnist-train-{}-ubyte.gz", "qmnist-test-{}-ubyte.gz"),
    ],
)
def test_files_are_found_under_the_names_that_people_have(tmp_path: Path, of_train: str, of_test: str) -> None:
    for name, content in GOOD.items():
        half, kind = name.split("-")[:2]
        path = tmp_path / (of_train if half == "train" else of_test).format(kind)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(content) if path.suffix.lower() == ".gz" else content)
    (tmp_path / ".DS_Store").write_bytes(b"train images")
    train, test = read_set(tmp_path)
    assert (train.examples, test.examples) == (3, 2)
    assert train.labels == b"\x00\x09\x05" and test.labels == b"\x01\x02"
    assert train.files[1] == of_train.format("labels")


def test_torchvisions_root_is_read_and_the_opening_names_the_files(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in GOOD.items():
        (raw / name).write_bytes(content)
        (raw / f"{name}.gz").write_bytes(gzip.compress(content))  # as torchvision keeps them
    train, _ = load(Config(dataset=str(tmp_path)))
    files = ", ".join(f"MNIST/raw/{name}" for name in GOOD)
    assert train.remarks[0] == f"its files: {files}"


def test_files_of_two_sets_are_never_mixed(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(3, content=b"\x01\x01\x01")))
    both = f"{folder}/train-labels-idx1-ubyte and {folder}/train-labels-idx1-ubyte.gz differ"
    with pytest.raises(InputError, match=both):
        read_set(folder)
    (folder / "train-labels-idx1-ubyte.gz").unlink()
    (folder / "other").mkdir()
    folder_with(folder / "other")
    two = r"2 files could be the train images, .*there is: other/train-images-idx3-ubyte, train-images-idx3-ubyte"
    with pytest.raises(InputError, match=two):
        read_set(folder)


def test_what_is_no_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"mnist: .*No such file .*; fashion-mnist is the one set known by name"):
        read_set(Path("mnist"))
    (tmp_path / "set.zip").touch()
    with pytest.raises(InputError, match=r"set\.zip is a file: unpack it if it is an archive, and name the folder"):
        read_set(tmp_path / "set.zip")
    (tmp_path / "set.zip").unlink()
    with pytest.raises(InputError, match=r"no files could be the train images.*; there is: nothing"):
        read_set(tmp_path)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_file_is_unpacked_by_its_content_whatever_its_name(tmp_path: Path, suffix: str) -> None:
    """A browser may unpack a file and keep its name, or drop the .gz of one that it keeps packed."""
    for name, content in GOOD.items():
        (tmp_path / f"{name}{suffix}").write_bytes(content if suffix else gzip.compress(content))
    assert read_set(tmp_path)[0].labels == b"\x00\x09\x05"


@pytest.mark.parametrize(("largest", "classes"), [(1, 10), (9, 10), (26, 27), (46, 47)])
@pytest.mark.parametrize("half", ["train", "t10k"])
def test_the_nets_have_an_output_for_every_label_of_both_halves(
    tmp_path: Path, half: str, largest: int, classes: int
) -> None:
    labels = {"train": bytes([0, 1, 1]), "t10k": bytes([1, 0])} | {half: bytes([0, 1, 1][: 2 + (half == "train")])}
    labels[half] = labels[half][:-1] + bytes([largest])
    content = {f"{name}_labels": idx(len(its), content=its) for name, its in labels.items()}
    train, test = load(Config(dataset=str(folder_with(tmp_path, **content)), train_examples=1))
    assert train.size == test.size == (1, classes)


def test_what_is_hard_to_learn_is_said_once(tmp_path: Path) -> None:
    pixels = bytes(range(16)) * (3 * 49)
    white = idx(2, 28, 28, content=b"\xff" * 2 * 784)
    labels = idx(3, content=bytes([4, 4, 4]))
    changes = {"train_images": idx(3, 28, 28, content=pixels), "t10k_images": white, "train_labels": labels}
    train, _ = load(Config(dataset=str(folder_with(tmp_path, **changes))))
    assert train.remarks[1:] == (
        "warning: the train images' pixels range from 0 to 15; the nets are made for 0 to 255",
        "warning: the test images' pixels range from 255 to 255; the nets are made for 0 to 255",
        "warning: all train labels are 4",
        "warning: only the test set has the class(es) 1, 2",
    )
    assert load(Config())[0].remarks == ()


@given(content=st.binary(max_size=64) | st.binary(max_size=48).map(lambda tail: bytes([0, 0, 8, 1]) + tail))
def test_no_bytes_are_read_wrongly_or_end_in_another_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "f").write_bytes(content)
    try:
        (count,), data = read_idx(folder / "f", 1)
    except InputError:
        return
    assert idx(count, content=data) == content
