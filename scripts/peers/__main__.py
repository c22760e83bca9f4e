"""Measure how far from one process's weights each way of training on W ranks ends, and how far apart its replicas.

    pip install -r scripts/peers/requirements.txt         # Lightning and transformers; without them their rows say so
    python -m scripts.peers                               # about three minutes on two cores, without a GPU
    python -m scripts.peers --only Accelerate --examples 1000 --world-size 2 --json peers.json

Same data, net, order of examples and learning rate, float64, one epoch, 64 examples a rank: scripts/peers/loops.py has
the loops. A cell is |w - w'| / |w' - w0|, with w of rank 0, w' of one process on batches of 64 W, w0 where both began.
Added are the examples that went forward beyond N, and the largest difference of a parameter between rank 0 and
another, where it is more than rounding. A loop whose ranks do not all end in time hangs, and is killed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from loop.config import Config, InputError
from loop.parity import HangError, RankError, Ranks
from loop.run.fetch import ensure_dataset
from scripts.command import command
from scripts.machine import hardware, versions
from scripts.peers.loops import ORPHANED_S, OURS, PEERS, Loop, Task, Trained, join, one_process, train_rank

ROUNDING = 1e-12
START_S = 180  # for imports and the first rendezvous
INSTALL = "not installed: pip install -r scripts/peers/requirements.txt"
MISMATCH = "aborts: ranks out of step"  # gloo's word: one rank's collective met another of the other's
CRASH = "crashes"
PACKAGES = ("torch", "accelerate", "lightning", "transformers")


@dataclass(frozen=True)
class Result:
    """A cell of the table. failure: in place of figures. duplicated: examples that went forward beyond N."""

    peer: str
    world_size: int
    examples: int
    distance: float | None = None
    replica_drift: float | None = None
    duplicated: int | None = None
    failure: str | None = None

    @property
    def exact(self) -> bool:
        """Whether every rank ended with one process's weights, to rounding."""
        return not self.failure and max(self.distance or 0, self.replica_drift or 0) <= ROUNDING

    def __str__(self) -> str:
        if self.distance is None or self.replica_drift is None:
            return str(self.failure)
        text = f"{100 * self.distance:.2g} %" if self.distance > ROUNDING else f"{self.distance:.0e}"
        text += f", {self.duplicated:+}" if self.duplicated else ""
        return text + (f", {self.replica_drift:.2g} apart" if self.replica_drift > ROUNDING else "")


def launch(loop: Loop, world_size: int, timeout: float, examples: int, data_dir: Path) -> list[Trained]:
    """Train on ranks of their own; return what each has in the end.

    Raises HangError if some are not done after `timeout` seconds, RankError if one fails.
    """
    with Ranks(world_size, preload=["scripts.peers.loops", "lightning.pytorch", "transformers.trainer"]) as ranks:
        ranks.run(join, timeout=START_S)
        return ranks.run(train_rank, loop, examples, data_dir, timeout=timeout)


def measure(peer: str, world_size: int, examples: int, timeout: float, data_dir: Path) -> Result:
    """Return what a peer makes of one case."""
    loop, package = PEERS[peer]
    if importlib.util.find_spec(package) is None:
        return Result(peer, world_size, examples, failure=INSTALL)
    try:
        trained = launch(loop, world_size, timeout, examples, data_dir)
    except HangError:
        return Result(peer, world_size, examples, failure=f"hangs (> {timeout:g} s)")
    except RankError as error:
        if "collective mismatch" in str(error):
            return Result(peer, world_size, examples, failure=MISMATCH)
        print(f"\n{peer}, W={world_size}, N={examples}:\n{error}", file=sys.stderr)
        return Result(
            peer, world_size, examples, failure=f"{CRASH}: {(str(error) or 'without a word').splitlines()[-1]}"
        )
    distance, drift = distances(trained, Task(examples, world_size, data_dir))
    return Result(peer, world_size, examples, distance, drift, sum(rank.seen for rank in trained) - examples)


def distances(trained: list[Trained], task: Task) -> tuple[float, float]:
    """Return rank 0's relative distance from one process's weights, and the largest difference from any rank to it."""
    start = task.weights()
    one_process(task)
    whole, first = task.weights(), trained[0].weights
    distance = np.linalg.norm(first - whole) / np.linalg.norm(whole - start)
    return float(distance), max(float(np.abs(rank.weights - first).max()) for rank in trained)


def table(results: Sequence[Result], *, markdown: bool) -> str:
    """Return peers by cases."""
    cases = sorted({(result.world_size, -result.examples) for result in results})
    cells = {(result.peer, result.world_size, -result.examples): str(result) for result in results}
    peers = dict.fromkeys(result.peer for result in results)
    rows = [["", *(f"W={world_size} N={-n}" for world_size, n in cases)]]
    rows += [[peer, *(cells[peer, *case] for case in cases)] for peer in peers]
    if markdown:
        rows.insert(1, ["---"] * len(rows[0]))
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def setting() -> str:
    """Return the versions and the machine."""
    found = ", ".join(f"{name} {version}" for name, version in versions(PACKAGES).items())
    return f"{found}; 1 torch thread a rank, {hardware()}, gloo"


@dataclass(frozen=True)
class Flags:
    """The flags."""

    examples: tuple[int, ...] = (1152, 1001, 1000, 897)
    """Training examples, N."""
    world_size: tuple[int, ...] = (2, 3)
    """Ranks, W."""
    only: tuple[str, ...] = ("",)
    """Only peers with one of these words in their name. Default: all."""
    timeout: float = 10
    """Seconds after which ranks are taken to hang."""
    data_dir: Path = Path("data")
    """Where Fashion-MNIST is kept."""
    markdown: bool = False
    """Print the table in Markdown."""
    json: Path | None = None
    """Write the figures into this file, too."""

    def chosen(self) -> list[str]:
        """Return the peers to measure. Raises InputError for values out of range."""
        available = ensure_dataset(Config(data_dir=self.data_dir), fetching=True).examples
        peers = [peer for peer in PEERS if any(word.lower() in peer.lower() for word in self.only)]
        for wrong, message in (
            (min(self.examples) < 1, f"--examples {min(self.examples)}: must be at least 1"),
            (max(self.examples) > available, f"--examples {max(self.examples)}: there are only {available}"),
            (min(self.world_size) < 2, f"--world-size {min(self.world_size)}: one rank has no one to differ from"),
            (not 0 < self.timeout < ORPHANED_S, f"--timeout {self.timeout:g}: must lie between 0 and {ORPHANED_S}"),
            (not peers, f"--only {' '.join(self.only)}: no such peer; there are: {'; '.join(PEERS)}"),
        ):
            if wrong:
                raise InputError(message)
        return peers


@command
def main(flags: Flags) -> int:
    """Measure and print; return 0 unless this project is off by more than rounding, or a peer crashes."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: no rank outlives this
    peers = flags.chosen()
    if flags.json:
        try:
            flags.json.open("a").close()  # can it be written? Before minutes of work
        except OSError as error:
            raise InputError(str(error)) from None
    print(setting())
    cases = [(peer, world_size, n) for peer in peers for world_size in flags.world_size for n in flags.examples]
    results = []
    with tqdm(cases, unit="case", dynamic_ncols=True) as bar:
        for peer, world_size, n in bar:
            bar.set_postfix_str(f"{peer}, W={world_size}, N={n}")
            results.append(measure(peer, world_size, n, flags.timeout, flags.data_dir))
    print(table(results, markdown=flags.markdown))
    if flags.json:
        flags.json.write_text(
            json.dumps({"setting": setting(), "results": [asdict(result) for result in results]}, indent=1)
        )
    crashed = [result for result in results if result.failure and result.failure.startswith(CRASH)]
    inexact = [result for result in results if result.peer.startswith(OURS) and not result.exact]
    for result in crashed + inexact:
        print(f"scripts.peers: {result.peer}, W={result.world_size}, N={result.examples}: {result}", file=sys.stderr)
    return int(bool(crashed or inexact))


if __name__ == "__main__":
    sys.exit(main())
