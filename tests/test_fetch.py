"""The data's faults: what is missing is found or fetched, what is wrong is named, nothing unverified is trained on."""

from __future__ import annotations

import gzip
import hashlib
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loop.config import InputError
from loop.run import fetch

DOWNLOADS = fetch._torchvision_download, fetch._debian_package
CONTENT = {name: f"the content of {name}".encode() for name in fetch.SHA256}


@pytest.fixture(autouse=True)
def small_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four small files stand for the real ones; no source has them, until a test gives it some."""
    monkeypatch.setattr(
        fetch, "SHA256", {name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()}
    )
    monkeypatch.setattr(fetch, "SYSTEM_FOLDER", tmp_path / "system")
    for source in ("_torchvision_download", "_debian_package"):
        monkeypatch.setattr(fetch, source, unavailable(source))


def unavailable(source: str):
    def fail(_: Path) -> Path:
        raise fetch.UnavailableError(f"{source} is out of reach")

    return fail


def fill(folder: Path, *, gz: bool = False, but: dict[str, bytes] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (CONTENT | (but or {})).items():
        (folder / f"{name}{'.gz' if gz else ''}").write_bytes(gzip.compress(content) if gz else content)
    return folder


def assert_good(raw: Path) -> None:
    assert {path.name for path in raw.iterdir()} == {*CONTENT, "verified.json"}, "and nothing half-written beside them"
    assert all((raw / name).read_bytes() == content for name, content in CONTENT.items())
    assert not list(raw.parent.glob(".fetch-*"))


def test_good_files_are_verified_once_and_that_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = fill(fetch.raw_folder(tmp_path))
    fetch.fetch_fashion_mnist(tmp_path)
    assert_good(raw)
    monkeypatch.setattr(fetch, "_problems", lambda raw: pytest.fail("hashed a second time"))
    fetch.fetch_fashion_mnist(tmp_path)


def test_a_system_package_is_unpacked(tmp_path: Path) -> None:
    fill(tmp_path / "system", gz=True)
    fetch.fetch_fashion_mnist(tmp_path / "data")
    assert_good(fetch.raw_folder(tmp_path / "data"))


@pytest.mark.parametrize("source", ["_torchvision_download", "_debian_package"])
def test_the_later_sources_are_used_when_the_earlier_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setattr(fetch, source, lambda scratch: fill(scratch / "unpacked", gz=True))
    fetch.fetch_fashion_mnist(tmp_path)
    assert_good(fetch.raw_folder(tmp_path))


@pytest.mark.parametrize("damage", [b"", b"truncat", b"the content of another file, of some length"])
def test_a_damaged_file_is_named_and_fetched_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: bytes
) -> None:
    raw = fill(fetch.raw_folder(tmp_path), but={"t10k-labels-idx1-ubyte": damage})
    fill(tmp_path / "system", gz=True)
    fetch.fetch_fashion_mnist(tmp_path)
    assert_good(raw)
    assert f"{raw / 't10k-labels-idx1-ubyte'} is corrupted" in capsys.readouterr().err


def test_damage_done_after_verification_is_found(tmp_path: Path) -> None:
    raw = fill(fetch.raw_folder(tmp_path))
    fetch.fetch_fashion_mnist(tmp_path)
    path = raw / "train-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="train-labels-idx1-ubyte is corrupted"):
        fetch.fetch_fashion_mnist(tmp_path)


def test_a_corrupted_download_never_takes_the_files_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = {"train-images-idx3-ubyte": b"not what was asked for"}
    monkeypatch.setattr(fetch, "_torchvision_download", lambda scratch: fill(scratch, but=bad))
    with pytest.raises(InputError, match="torchvision's download: train-images-idx3-ubyte is corrupted"):
        fetch.fetch_fashion_mnist(tmp_path)
    assert not (fetch.raw_folder(tmp_path) / "train-images-idx3-ubyte").exists()


def test_a_torn_gz_is_a_reason_not_a_traceback(tmp_path: Path) -> None:
    fill(tmp_path / "system", gz=True)
    torn = tmp_path / "system" / "train-images-idx3-ubyte.gz"
    torn.write_bytes(torn.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"train-images-idx3-ubyte\.gz cannot be read"):
        fetch.fetch_fashion_mnist(tmp_path)


def test_when_every_source_fails_one_message_lists_them_all(tmp_path: Path) -> None:
    with pytest.raises(InputError) as failure:
        fetch.fetch_fashion_mnist(tmp_path)
    message = str(failure.value)
    for part in (
        "--data-dir", "not installed", "_torchvision_download is out of reach", "_debian_package is out of reach",
        "Put the four files", "--dataset FOLDER",
    ):  # fmt: skip
        assert part in message


def test_only_a_download_in_which_nothing_changes_any_more_is_cleared_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "ABANDONED_S", 1)
    fill(tmp_path / "system", gz=True)
    folder = fetch.raw_folder(tmp_path).parent
    killed, under_way = folder / ".fetch-killed", folder / ".fetch-under-way"
    for scratch in (killed, under_way):
        (scratch / "raw").mkdir(parents=True)
        (scratch / "raw" / "half").write_bytes(b"...")
    time.sleep(1.5)
    with (under_way / "raw" / "half").open("ab") as half:  # by another node
        half.write(b"...")
    fetch.fetch_fashion_mnist(tmp_path)
    assert list(folder.glob(".fetch-*")) == [under_way]
    assert (under_way / "raw" / "half").read_bytes() == b"......"


def test_a_full_disk_is_the_reason_given(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for source in DOWNLOADS:
        monkeypatch.setattr(fetch, source.__name__, source)
    with pytest.raises(InputError) as failure:
        fetch.fetch_fashion_mnist(disk)
    full = f"needs up to 200 MB, and the disk of {disk / 'FashionMNIST'} has 1 MB free"
    raw = fetch.raw_folder(disk)
    assert str(failure.value).splitlines() == [
        "Fashion-MNIST cannot be obtained. Tried, in order:",
        f"  --data-dir, {raw}: no train-images-idx3-ubyte",
        f"  the system's package, {tmp_path / 'system'}: not installed",
        f"  torchvision's download: {full}",
        f"  the Debian/Ubuntu package dataset-fashion-mnist: {full}",
        f"Put the four files {', '.join(CONTENT)} (plain or .gz) into {raw},",
        "or name a folder with another set: --dataset FOLDER",
    ]
    assert capsys.readouterr().err == ""


def test_a_read_only_copy_is_used_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = fill(fetch.raw_folder(tmp_path))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root, whom no mode bit stops
    fetch.fetch_fashion_mnist(tmp_path)
    assert not (raw / "verified.json").exists()


def test_a_data_dir_that_is_a_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    with pytest.raises(InputError, match=r"--data-dir .* cannot keep Fashion-MNIST there"):
        fetch.fetch_fashion_mnist(tmp_path / "data")


def _slow_source(log: Path):
    def source(scratch: Path) -> Path:
        with log.open("a") as file:
            file.write("fetched\n")
        time.sleep(1.5)
        return fill(scratch / "unpacked")

    return source


def test_of_jobs_at_once_one_fetches_and_the_others_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_torchvision_download", _slow_source(tmp_path / "log"))
    context = multiprocessing.get_context("fork")  # the children inherit the stand-ins
    data = tmp_path / "data"
    jobs = [context.Process(target=fetch.fetch_fashion_mnist, args=(data,)) for _ in range(2)]
    jobs.append(context.Process(target=fetch.wait_for_fashion_mnist, args=(data,)))
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(20)
    assert [job.exitcode for job in jobs] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "fetched\n"
    assert_good(fetch.raw_folder(data))


def test_who_waits_in_vain_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no process has fetched"):
        fetch.wait_for_fashion_mnist(tmp_path, idle_s=0.3)


def test_looking_for_the_data_loads_no_torch() -> None:
    code = "import sys, loop.run.fetch, loop.run.launch, loop.shards; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
