"""The files of the data set: found, fetched and verified.

Fashion-MNIST is looked for in `--data-dir`, an installed system package, torchvision's download, and the Debian or
Ubuntu package, unpacked without root. Nothing enters `--data-dir` unverified: each file's SHA-256 is checked before an
atomic rename, and remembered with the file's size and time so that later starts need four `stat` calls.

Imports torch only for torchvision's download.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path

from filelock import Timeout

from loop.config import FASHION_MNIST, Config, InputError
from loop.files import write_whole
from loop.idx import UNREADABLE, SetSize, classes_of, raw_folder, read_plain_or_gz, read_set
from loop.run.folder import acquire

SHA256 = {  # of the uncompressed files
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
SYSTEM_FOLDER = Path("/usr/share/datasets/fashion-mnist")
TRAINING_EXAMPLES = 60_000
DEBIAN_PACKAGE = "dataset-fashion-mnist"
STALL_S = 30  # a source that sends nothing for so long has failed
ABANDONED_S = 24 * 3600  # a download in which nothing has changed for so long was killed
DOWNLOAD_BYTES = 200e6  # what a download takes on the disk, unpacked and copied to its place


class UnavailableError(Exception):
    """Why one source of the data cannot be used."""


def ensure_dataset(config: Config, *, fetching: bool) -> SetSize:
    """Make sure that the files of --dataset are there and sound; return what they hold to train on.

    fetching: whether this is the one process of its machine that fetches; the others wait for it.
    """
    if config.dataset != FASHION_MNIST:
        halves = read_set(Path(config.dataset))
        return SetSize(config.training_size(halves[0].examples), classes_of(halves))
    if fetching:
        fetch_fashion_mnist(config.data_dir)
    else:
        wait_for_fashion_mnist(config.data_dir)
    return SetSize(config.training_size(TRAINING_EXAMPLES))


def fetch_fashion_mnist(data_dir: Path) -> None:
    """Make sure that `data_dir` holds the four verified files; fetch what is missing or corrupted.

    Safe to call from several jobs at once: one works, the others wait. Raises InputError when every source fails.
    """
    raw = raw_folder(data_dir)
    try:
        if _remembered(raw) or not (os.access(raw, os.W_OK) or _problems(raw)):  # a good copy that is read-only
            return
        raw.mkdir(parents=True, exist_ok=True)
        with acquire(_lock_path(data_dir), f"another process that fetches Fashion-MNIST into {data_dir}"):
            if not _remembered(raw):
                _fetch(raw, _problems(raw))
    except OSError as error:
        raise InputError(f"--data-dir {data_dir}: cannot keep Fashion-MNIST there: {error}") from None


def wait_for_fashion_mnist(data_dir: Path, idle_s: float = 60) -> None:
    """Wait while another process of this machine fetches; raises InputError if, for `idle_s` seconds, none does."""
    raw, idle_since = raw_folder(data_dir), time.monotonic()
    while not _remembered(raw) and _problems(raw):
        try:
            acquire(_lock_path(data_dir), "", timeout=0).release()
        except Timeout:
            idle_since = time.monotonic()
        except OSError:
            pass
        if time.monotonic() - idle_since > idle_s:
            raise InputError(f"--data-dir {data_dir}: no process has fetched Fashion-MNIST within {idle_s:.0f} s")
        time.sleep(0.2)


def _fetch(raw: Path, problems: dict[str, str]) -> None:
    """Try the sources in turn, for the files with problems; the caller holds the lock."""
    for name, problem in problems.items():
        if (raw / name).exists():
            _say(f"{raw / name} {problem}: fetching it again")
    sources: list[tuple[str, Callable[[Path], Path]]] = [
        (f"--data-dir, {raw}", lambda _: raw),
        (f"the system's package, {SYSTEM_FOLDER}", _system_package),
        ("torchvision's download", _torchvision_download),
        (f"the Debian/Ubuntu package {DEBIAN_PACKAGE}", _debian_package),
    ]
    _remove_abandoned(raw.parent)
    failures = []
    for description, source in sources:
        with tempfile.TemporaryDirectory(dir=raw.parent, prefix=".fetch-", ignore_cleanup_errors=True) as scratch:
            try:
                _install(source(Path(scratch)), raw, list(problems))
            except UnavailableError as reason:
                failures.append(f"  {description}: {reason}")
                continue
        if failures:
            _say(f"Fashion-MNIST taken from {description}, verified, kept in {raw}")
        return
    raise InputError(
        "Fashion-MNIST cannot be obtained. Tried, in order:\n"
        + "\n".join(failures)
        + f"\nPut the four files {', '.join(SHA256)} (plain or .gz) into {raw},"
        + "\nor name a folder with another set: --dataset FOLDER"
    )


def _remove_abandoned(folder: Path) -> None:
    """Remove what killed downloads left, but no download under way on another node, which may not share the lock."""
    for scratch in folder.glob(".fetch-*"):
        with suppress(OSError):  # it may be removed at this moment
            if time.time() - max(path.lstat().st_ctime for path in (scratch, *scratch.rglob("*"))) > ABANDONED_S:
                shutil.rmtree(scratch)


def _install(folder: Path, raw: Path, names: list[str]) -> None:
    """Copy the named files from `folder`, plain or .gz, verifying each before it takes its name in `raw`."""
    for name in names:
        reasons = []
        for path in (folder / name, folder / f"{name}.gz"):
            try:
                content = read_plain_or_gz(path)
            except FileNotFoundError:
                continue
            except UNREADABLE as error:
                reasons.append(f"{path.name} cannot be read ({error})")
                continue
            if problem := _mismatch(name, hashlib.sha256(content).hexdigest()):
                reasons.append(f"{path.name} {problem}")
                continue
            write_whole(raw / name, content)
            break
        else:
            raise UnavailableError("; ".join(reasons) or f"no {name}")
    _remember(raw)


def _system_package(_: Path) -> Path:
    if not SYSTEM_FOLDER.is_dir():
        raise UnavailableError("not installed")
    return SYSTEM_FOLDER


def _require_space(scratch: Path) -> None:
    """Raise UnavailableError where a download may fill the disk, on which `apt-get update` hangs."""
    free = shutil.disk_usage(scratch).free
    if free < DOWNLOAD_BYTES:
        raise UnavailableError(
            f"needs up to {DOWNLOAD_BYTES / 1e6:.0f} MB, and the disk of {scratch.parent} has {free / 1e6:.0f} MB free"
        )


def _torchvision_download(scratch: Path) -> Path:
    _require_space(scratch)
    _say("downloading Fashion-MNIST (30 MB) with torchvision")
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALL_S)  # torchvision sets none, and would wait for ever
    try:
        from torchvision.datasets import FashionMNIST

        FashionMNIST(str(scratch), download=True)
    except (ImportError, OSError, RuntimeError, HTTPException) as error:
        raise UnavailableError(" ".join(str(error).split())) from None
    finally:
        socket.setdefaulttimeout(patience)
    return raw_folder(scratch)


def _debian_package(scratch: Path) -> Path:
    _require_space(scratch)
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise UnavailableError(f"no {tool} on this machine")
    _say(f"downloading the package {DEBIAN_PACKAGE} (31 MB) with apt-get")
    apt_get = ["apt-get", "-o", f"Acquire::http::Timeout={STALL_S}"]
    try:
        _run([*apt_get, "download", DEBIAN_PACKAGE], scratch)
    except UnavailableError:  # perhaps there are no package lists: fetch them into a folder that needs no root
        (scratch / "lists" / "partial").mkdir(parents=True)
        apt_get += ["-o", f"Dir::State::Lists={scratch / 'lists'}", "-o", f"Dir::Cache={scratch}"]
        _run([*apt_get, "update"], scratch)
        _run([*apt_get, "download", DEBIAN_PACKAGE], scratch)
    for package in scratch.glob("*.deb"):
        _run(["dpkg-deb", "-x", package.name, "unpacked"], scratch)
    return scratch / "unpacked" / SYSTEM_FOLDER.relative_to("/")


def _run(command: list[str], folder: Path) -> None:
    """Run a command, its progress shown on stderr; raise UnavailableError with its last error line if it fails."""
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=2,  # its progress, beside our own messages
            stderr=subprocess.PIPE,
            text=True,
            timeout=600,
        )
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"`{' '.join(command)}` took over 600 s") from None
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if not line.startswith("W:")]
        raise UnavailableError(errors[-1] if errors else f"`{' '.join(command)}` ended with {done.returncode}")


def _problems(raw: Path) -> dict[str, str]:
    """Return what is wrong with each file that is not as it should be."""
    problems = {}
    for name in SHA256:
        try:
            with (raw / name).open("rb") as file:
                problem = _mismatch(name, hashlib.file_digest(file, "sha256").hexdigest())
        except OSError as error:
            problem = f"cannot be read ({error.strerror})"
        if problem:
            problems[name] = problem
    return problems


def _mismatch(name: str, digest: str) -> str | None:
    return None if digest == SHA256[name] else f"is corrupted (SHA-256 {digest[:12]}..., not {SHA256[name][:12]}...)"


def _stamp(raw: Path) -> dict[str, list[int]]:
    stats = {name: (raw / name).stat() for name in SHA256}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def _remember(raw: Path) -> None:
    write_whole(raw / "verified.json", json.dumps(_stamp(raw)).encode())


def _remembered(raw: Path) -> bool:
    """Whether the four files are those that were verified: same sizes, same times."""
    try:
        return bool(json.loads((raw / "verified.json").read_bytes()) == _stamp(raw))
    except (OSError, ValueError):
        return False


def _lock_path(data_dir: Path) -> Path:
    return data_dir / "FashionMNIST" / ".lock"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
