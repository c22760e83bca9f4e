"""The idx format of MNIST-like sets (described at yann.lecun.com/exdb/mnist), read and checked. Imports no torch."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

from loop.config import InputError

IMAGE_SIZE = 28
CLASSES = 10
UNREADABLE = (OSError, EOFError, zlib.error)  # what a missing, forbidden, truncated or corrupted file raises


def raw_folder(data_dir: Path) -> Path:
    """Return the folder in which torchvision's FashionMNIST(data_dir) keeps its files."""
    return data_dir / "FashionMNIST" / "raw"


def read_plain_or_gz(path: Path) -> bytes:
    """Return a file's bytes, decompressed if its name ends in .gz."""
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def read_idx(folder: Path, name: str, dims: int) -> tuple[tuple[int, ...], bytes]:
    """Return the shape and the unsigned bytes of one idx file, plain or .gz.

    Raises InputError, naming the file, if it is missing, unreadable, not of `dims` dimensions of unsigned bytes, or
    longer or shorter than its header says.
    """
    path = folder / name
    try:
        if not path.exists():
            path = folder / f"{name}.gz"
        content = read_plain_or_gz(path)
    except FileNotFoundError:
        raise InputError(f"--dataset {folder}: no file {name} or {name}.gz") from None
    except UNREADABLE as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    header = 4 + 4 * dims
    if len(content) < header or content[:4] != bytes([0, 0, 8, dims]):
        raise InputError(
            f"{path}: not an idx file of {dims} dimension(s) of unsigned bytes: starts with {content[:4].hex(' ')!r}, "
            f"not {bytes([0, 0, 8, dims]).hex(' ')!r}"
        )
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4))
    if len(content) - header != math.prod(shape):
        raise InputError(f"{path}: holds {len(content) - header} bytes of data; its header says {math.prod(shape)}")
    return shape, content[header:]


def read_idx_split(folder: Path, prefix: str) -> tuple[int, bytes, bytes]:
    """Return (examples, images, labels) of the `train` or `t10k` half of a folder of idx files, checked."""
    shape, images = read_idx(folder, f"{prefix}-images-idx3-ubyte", 3)
    (count,), labels = read_idx(folder, f"{prefix}-labels-idx1-ubyte", 1)
    if shape[1:] != (IMAGE_SIZE, IMAGE_SIZE):
        raise InputError(f"{folder}: the {prefix} images are {shape[1]} x {shape[2]}; the nets take 28 x 28")
    if shape[0] != count:
        raise InputError(f"{folder}: {shape[0]} {prefix} images, but {count} labels")
    if count == 0:
        raise InputError(f"{folder}: the {prefix} files hold no examples")
    if max(labels) >= CLASSES:
        raise InputError(f"{folder}: a {prefix} label is {max(labels)}; the nets have {CLASSES} classes, 0 to 9")
    return count, images, labels
