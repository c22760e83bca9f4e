"""The idx format of MNIST-like sets (described at yann.lecun.com/exdb/mnist): found, read and checked. No torch."""

from __future__ import annotations

import gzip
import math
import stat
import zlib
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from loop.config import FASHION_MNIST, InputError

IMAGE_SIZE = 28
FEWEST_CLASSES = 10  # the nets have as many outputs, even for fewer labels
UNREADABLE = (OSError, EOFError, zlib.error)  # what a missing, forbidden, truncated or corrupted file raises
HALVES = {"train": ("train",), "test": ("test", "t10k")}  # what a half is called in the names of its files
KINDS = {"images": 3, "labels": 1}  # the number of dimensions of each
TYPES = {
    8: "unsigned bytes", 9: "signed bytes", 11: "16-bit integers", 12: "32-bit integers", 13: "32-bit floats",
    14: "64-bit floats",
}  # fmt: skip


class Half(NamedTuple):
    """The training or the test half of a set, as bytes. files: their names in the set's folder."""

    examples: int
    images: bytes
    labels: bytes
    files: tuple[str, str]


class SetSize(NamedTuple):
    """What a run's plan and nets take from the set. examples: those trained on. classes: outputs of the nets."""

    examples: int
    classes: int = FEWEST_CLASSES


def raw_folder(data_dir: Path) -> Path:
    """Return the folder in which torchvision's FashionMNIST(data_dir) keeps its files."""
    return data_dir / "FashionMNIST" / "raw"


def read_set(folder: Path) -> tuple[Half, Half]:
    """Return the training and the test half of the set in a folder, checked.

    Its files are known by their names, in the folder or below it: `train`, or `test` or `t10k`, with `images` or
    `labels`, in upper or lower case, plain or .gz. Raises InputError, naming the file and what is wrong, unless there
    is exactly one of each of the four, sound.
    """
    try:
        if not stat.S_ISDIR(folder.stat().st_mode):
            raise InputError(f"--dataset {folder} is a file: unpack it if it is an archive, and name the folder")
    except OSError as error:
        remedy = f"; {FASHION_MNIST} is the one set known by name" if isinstance(error, FileNotFoundError) else ""
        raise InputError(f"--dataset {folder}: cannot be read: {error.strerror}{remedy}") from None
    try:
        there = sorted(path for path in folder.rglob("*") if path.is_file() and not _hidden(path, folder))
    except OSError as error:
        raise InputError(f"--dataset {folder}: cannot be read: {error.strerror}") from None
    train, test = ({kind: _find(folder, there, half, kind) for kind in KINDS} for half in HALVES)
    return _read_half(folder, train), _read_half(folder, test)


def read_fashion_mnist(data_dir: Path) -> tuple[Half, Half]:
    """Return the two halves of Fashion-MNIST, which is in its place under its own names. Raises InputError if not."""
    raw = raw_folder(data_dir)
    train, test = ({k: raw / f"{half}-{k}-idx{dims}-ubyte" for k, dims in KINDS.items()} for half in ("train", "t10k"))
    return _read_half(raw, train), _read_half(raw, test)


def classes_of(halves: tuple[Half, Half]) -> int:
    """Return how many outputs the nets need: one more than the largest label, and at least ten."""
    return max(FEWEST_CLASSES, 1 + max(max(half.labels) for half in halves))


def _read_half(folder: Path, paths: dict[str, Path]) -> Half:
    (shape, images), ((count,), labels) = (read_idx(paths[kind], dims) for kind, dims in KINDS.items())
    if shape[1:] != (IMAGE_SIZE, IMAGE_SIZE):
        raise InputError(f"{paths['images']}: images of {shape[1]} x {shape[2]}; the nets take 28 x 28")
    if shape[0] != count:
        raise InputError(f"{paths['labels']}: {count} labels for {shape[0]} images")
    if count == 0:
        raise InputError(f"{paths['labels']}: no examples")
    names = [str(path.relative_to(folder)) for path in paths.values()]
    return Half(count, images, labels, (names[0], names[1]))


def _find(folder: Path, there: list[Path], half: str, kind: str) -> Path:
    """Return the one file that holds a half's images or labels; the plain one, if it is there plain and as .gz."""
    found = [path for path in there if kind in path.name.lower() and any(w in path.name.lower() for w in HALVES[half])]
    plain = [path for path in found if not _packed(path)]
    packed = [path for path in found if _packed(path) and path.with_suffix("") not in plain]
    if len(plain + packed) == 1:
        _refuse_two_contents([path for path in found if path not in plain + packed], *plain, *packed)
        return (plain + packed)[0]
    names = [str(path.relative_to(folder)) for path in (found or there)]
    listed = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "nothing"
    wanted = f"the {half} {kind}, a name with {' or '.join(map(repr, HALVES[half]))} and {kind!r}"
    raise InputError(f"--dataset {folder}: {len(found) or 'no'} files could be {wanted}; there is: {listed}")


def _refuse_two_contents(packed: list[Path], plain: Path) -> None:
    for other in packed:
        with suppress(*UNREADABLE):  # then they differ
            if read_plain_or_gz(other) == read_plain_or_gz(plain):
                continue
        raise InputError(f"{plain} and {other} differ: remove the one that is not meant")


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)


def _packed(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def read_plain_or_gz(path: Path) -> bytes:
    """Return a file's bytes, decompressed where they are gzip's, whatever its name. Raises one of UNREADABLE."""
    content = path.read_bytes()  # a browser may have unpacked it and kept its name, or have dropped the .gz
    return gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content


def read_idx(path: Path, dims: int) -> tuple[tuple[int, ...], bytes]:
    """Return the shape and the unsigned bytes of one idx file, plain or .gz.

    Raises InputError, naming the file, if it is missing, unreadable, not of `dims` dimensions of unsigned bytes, or
    longer or shorter than its header says.
    """
    try:
        content = read_plain_or_gz(path)
    except UNREADABLE as error:
        remedy = "" if isinstance(error, OSError) and error.errno else ": fetch it again"
        raise InputError(f"{path}: cannot be read: {error}{remedy}") from None
    header = 4 + 4 * dims
    if len(content) < header or content[:2] != bytes(2) or content[2] not in TYPES:
        raise InputError(f"{path}: not an idx file of unsigned bytes in {dims} dimension(s)")
    if content[2:4] != bytes([8, dims]):
        raise InputError(
            f"{path}: holds {TYPES[content[2]]} in {content[3]} dimension(s); wanted are unsigned bytes in {dims}"
        )
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4))
    if len(content) - header != math.prod(shape):
        raise InputError(f"{path}: holds {len(content) - header} bytes of data; its header says {math.prod(shape)}")
    return shape, content[header:]
