"""Do the claims of this project hold on this machine, on its CPU and on every GPU it has?

    python -m scripts.verify                        all of it; exit code 1 if a claim fails
    python -m scripts.verify --only weights bits    some of it

It prints the machine, a row for each claim as soon as it is measured, and a last line; verify.json has the same, also
after Ctrl-C. It trains by train.py, one launch for each number of ranks, starts loop.parity, and reads what they leave.

    weights  in float64 the weights of several ranks, and of GPUs, are those of one CPU process
    bits     with --virtual-ranks the bytes of the weights are equal on any number of ranks
    audits   every step's gradient is one process's, to the rounding of its precision
    resume   a run that was killed and goes on, or is audited, ends in the bytes of one that was not
    waits    on GPUs, no step between log steps waits for the device
    lost     a stopped rank is named in time, and no process is left
    parity   a right loop passes, and the fault of a wrong one is named
    speed    an epoch over a bare loop's, and the latency of an all-reduce: reported, without a bound
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import psutil
from tqdm import tqdm

from loop.config import Config, InputError, parse
from loop.files import write_whole
from loop.parity import HangError, RankError, Ranks
from loop.run.fetch import ensure_dataset
from loop.run.launch import launched_rank
from scripts import soak
from scripts.command import command
from scripts.machine import hardware, versions
from scripts.runs import distance

Part = Literal["weights", "bits", "audits", "resume", "waits", "lost", "parity", "speed"]
ROUNDING = 1e-12
BOUNDS = {"float32": 1e-5, "bf16": 3e-2, "fp16": 1e-2}  # about 100, 4 and 10 units in the last place
SMALL = "--train-examples 643 --batch-size 128 --epochs 1"  # 3 examples in the last step
WEIGHTS = {
    "softmax": "",
    "mlp": "--net mlp",
    "lenet": "--net lenet",
    "a rank without examples": "--tail ragged",
    "K = 2": "--accumulate 2",
    "sum at lr / n": f"--reduction sum --lr {0.1 / 128}",
    "the book's sgd": "--updater scratch --reduction sum",
}
LONG = "--train-examples 515 --batch-size 128 --epochs 100 --checkpoint-every 20"
RESULT = Path("verify.json")
TIMEOUT_S, NAMED_S, HANG_S, ROUNDS = 5, 15, 240, 6
TABLE = "{:<44}{:<27}{:<32}{:<10}{}"


class Place(NamedTuple):
    """So many ranks, on the CPU or on so many GPUs; where these are fewer, ranks share them over gloo."""

    ranks: int
    gpus: int = 0

    def __str__(self) -> str:
        if self.ranks > self.gpus > 0:
            return f"{self.ranks} ranks on {self.gpus} GPU, gloo"
        return f"{self.ranks} {'GPU' if self.gpus else 'CPU rank'}{'s' * (self.ranks > 1)}"


class Failed(RuntimeError):  # noqa: N818  # ranks that came to no good end
    """Ranks have failed; the text is their last words."""


def places(gpus: int) -> list[Place]:
    """Return where a machine with so many GPUs trains, the reference, one CPU process, first."""
    on_gpus = [Place(1, 1), Place(2, 1) if gpus == 1 else Place(gpus, gpus)] if gpus else []
    return [Place(1), Place(2), Place(3), Place(4), *on_gpus]


def runs_at(place: Place, parts: Sequence[str]) -> dict[str, str]:
    """Return what a place trains for these parts: flags of train.py, by the run's name."""
    runs: dict[str, str] = {}
    if "weights" in parts and (place.gpus or place.ranks < 4):
        runs |= {name: f"{SMALL} --dtype float64 {flags}" for name, flags in WEIGHTS.items()}
    if "bits" in parts and 8 % place.ranks == 0:
        runs["bits"] = f"{SMALL} --virtual-ranks 8 --net mlp --momentum 0.9"
    if place == Place(2) or place.gpus:
        precisions = {"float32": "", "bf16": "--mixed-precision bf16"}
        if place.gpus:
            precisions["fp16"] = "--mixed-precision fp16"
        if "audits" in parts:
            runs |= {name: f"{SMALL} --audit-every 1 {flags}" for name, flags in precisions.items()}
        if "resume" in parts:
            runs |= {"audited": f"{SMALL} --audit-every 1", "not audited": SMALL}
    return runs


def plan(parts: Sequence[str], gpus: int) -> tuple[list[tuple[str, Place]], list[str]]:
    """Return the steps, each a method of Verify and a place, and what is left out for want of GPUs."""
    here = places(gpus)
    steps = [("train", place) for place in here if runs_at(place, parts) or ("speed" in parts and place.ranks < 3)]
    if "waits" in parts:
        steps += [("wait", place) for place in here if place.gpus]
    alone = [place for place in here if place == Place(2) or place.gpus == place.ranks]
    if "resume" in parts:
        steps += [("resume", place) for place in alone]
    if "lost" in parts:
        steps += [("lose", place) for place in alone if place.ranks > 1]
    if "parity" in parts:
        steps.append(("parity", Place(1)))
    left_out = "all that needs a GPU" if gpus == 0 else "several GPUs over NCCL" if gpus == 1 else ""
    return steps, [f"left out: {left_out}"] if left_out else []


@dataclass(frozen=True)
class Row:
    """A row of the table. holds: None where there is no bound."""

    claim: str
    where: str
    measured: str
    bound: str = "none"
    holds: bool | None = None

    def __str__(self) -> str:
        word = {True: "holds", False: "FAILS", None: ""}[self.holds]
        return TABLE.format(self.claim, self.where, self.measured, self.bound, word).rstrip()


@dataclass
class Verify:
    """A verification under way. out: a folder for its runs. rows: what was found, in order."""

    parts: Sequence[str]
    out: Path
    bar: tqdm[Any]
    rows: list[Row] = field(default_factory=list)

    def state(self, claim: str, place: object, measured: str, bound: str = "none", holds: bool | None = None) -> None:
        """Print a row of the table, and keep it."""
        self.rows.append(Row(claim, str(place), measured, bound, holds))
        self.bar.write(str(self.rows[-1]))

    def equal(self, claim: str, place: Place, different: Sequence[str]) -> None:
        """State that bytes are equal, or what of them is not."""
        self.state(claim, place, f"{' and '.join(different)} differ" if different else "equal", "equal", not different)

    def same(self, claim: str, place: Place, run: str, reference: Path) -> None:
        """State whether the weights of a run and of the one in a folder are the same bytes."""
        a, b = ((folder / "model.safetensors").read_bytes() for folder in (self.folder(place, run), reference))
        self.equal(claim, place, [] if a == b else ["weights"])

    def train(self, place: Place) -> None:
        """Train all of a place's runs in one launch, and judge them."""
        runs = runs_at(place, self.parts)
        measured = self.launch(place, runs, timed="speed" in self.parts and place.ranks < 3)
        first = Place(1, min(place.gpus, 1))
        if "softmax" in runs and place != Place(1):
            off = {name: distance(self.folder(place, name), self.folder(Place(1), name)) for name in WEIGHTS}
            worst = max(off, key=lambda name: math.inf if math.isnan(off[name]) else off[name])
            claim, found = f"float64 weights, {len(off)} trainings", f"{off[worst]:.1e} off ({worst})"
            self.state(claim, place, found, f"{ROUNDING}", off[worst] <= ROUNDING)
        if "bits" in runs and place != first:
            self.same("--virtual-ranks 8, the weights' bytes", place, "bits", self.folder(first, "bits"))
        for precision, bound in BOUNDS.items():
            if precision in runs:
                folder = self.folder(place, precision)
                rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
                errors = [row["audit/grad_rel_err"] for row in rows if "audit/grad_rel_err" in row]
                skipped = json.loads((folder / "summary.json").read_text())["skipped_steps"]
                finite = [error for error in errors if math.isfinite(error)]
                worst_error = max(finite, default=math.inf)
                found = f"{worst_error:.1e} off, {len(errors)} steps" + f", {skipped} skipped" * bool(skipped)
                holds = worst_error <= bound and len(errors) - len(finite) == skipped
                self.state(f"gradients audited, {precision}", place, found, f"{bound}", holds)
        if "audited" in runs:
            self.same("an audited run, its weights' bytes", place, "audited", self.folder(place, "not audited"))
        for what, figure in measured.items():
            self.state(what, place, figure)

    def wait(self, place: Place) -> None:
        """Train while a watch makes whatever waits for the device an error."""
        self.launch(place, {"waits": f"{SMALL} --epochs 9 --log-every 7"})
        self.state("steps that wait for the device", place, "none", "none", True)

    def resume(self, place: Place) -> None:
        """Kill a run in mid-training, go on with it, and compare the end with an uninterrupted run's."""
        on_gpus = f"--virtual-ranks {place.ranks}" if place.gpus else ""  # which asks for deterministic algorithms
        whole, cut = (self.line(place, name, f"{LONG} {on_gpus} --resume auto") for name in ("whole", "cut"))
        with self.started(place, "train", whole) as process:
            self.ended(process)
        with self.started(place, "train", cut) as process:
            self.has_a_checkpoint(process, self.folder(place, "cut"))
        if (self.folder(place, "cut") / "summary.json").exists():
            raise Failed("the run ended before it could be killed")
        with self.started(place, "train", cut) as process:
            self.ended(process)
        claim = "a killed run that went on" + (", deterministic" if on_gpus else "")
        self.equal(claim, place, soak.compare(self.folder(place, "cut"), self.folder(place, "whole")))

    def lose(self, place: Place) -> None:
        """Stop rank 1; see whether it is named, when, and which processes are left."""
        line = self.line(place, "lost", f"{LONG} --epochs 10000 --ddp-timeout {TIMEOUT_S}")
        with self.started(place, "train", line) as process:
            self.has_a_checkpoint(process, self.folder(place, "lost"))
            members = soak.family(process)
            (stopped,) = (rank for rank in soak.ranks(members[1:]) if rank.environ()["RANK"] == "1")
            stopped.suspend()
            began, named = time.monotonic(), None
            while not named and time.monotonic() < began + TIMEOUT_S + NAMED_S:
                time.sleep(0.1)
                named = re.search(r"error: rank 1 is ", self.log.read_text())
            took = time.monotonic() - began
            with suppress(psutil.NoSuchProcess):
                stopped.resume()  # else its launcher would wait 30 s before it kills it
            left = psutil.wait_procs(members, 40)[1] if named else members
        found = f"named after {took:.1f} s, {len(left)} left" if named else f"not named within {took:.0f} s"
        self.state("a stopped rank", place, found, f"{TIMEOUT_S + NAMED_S} s, 0", bool(named) and not left)

    def parity(self, _: Place) -> None:
        """Give loop.parity a right loop, and the same with each rank's own mean."""
        data = ["--data", "tests.planted:masked_lines", "--batch-size", "16", "--masked", "-100", "--world-sizes", "2"]
        for loop, claim, said in (
            ("train", "parity, a right loop", "as one process"),
            ("plain", "parity, a wrong loop", "a mean of means"),
        ):
            words = [sys.executable, "-m", "loop.parity", f"scripts.recipes.masked_tokens:{loop}", *data]
            done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=soak.ROOT, timeout=HANG_S)
            right = said in done.stdout and done.returncode == (loop == "plain")
            found = said if right else last_words(done.stdout + done.stderr)
            self.state(claim, "1 and 2 CPU ranks", found, "named" if loop == "plain" else "passes", right)

    def folder(self, place: Place, run: str) -> Path:
        """Return where a run is."""
        return self.out / str(place) / run

    def line(self, place: Place, run: str, flags: str) -> list[str]:
        """Return train.py's command line for a run."""
        kept = ["--out", str(self.out / str(place)), "--run-name", run, "--wandb", "disabled"]
        return [*flags.split(), *kept, *([] if place.gpus else ["--cpu"])]

    def launch(self, place: Place, runs: dict[str, str], *, timed: bool = False) -> dict[str, str]:
        """Train runs in one launch; return what its ranks measured beside them. Raises Failed."""
        from scripts import verify  # by its name: this is __main__, which no rank can import

        found: dict[str, str]
        lines = {name: self.line(place, name, flags) for name, flags in runs.items()}
        if not place.gpus:
            try:
                with Ranks(place.ranks, preload=["accelerate", "scripts.verify", "train"]) as ranks:
                    found = ranks.run(verify.work, tuple(place), lines, timed, timeout=HANG_S)[0]
            except (RankError, HangError) as error:
                raise Failed(last_words(str(error))) from None
            return found
        job = self.out / "job.json"
        job.write_text(json.dumps([place, lines, timed]))
        with self.started(place, "scripts.verify", ["--worker", str(job)]) as process:
            self.ended(process)
        found = json.loads(job.with_suffix(".found").read_text())
        return found

    @property
    def log(self) -> Path:
        """What the newest launch has printed."""
        return self.out / "log"

    @contextmanager
    def started(self, place: Place, module: str, words: list[str]) -> Iterator[subprocess.Popen[bytes]]:
        """Start ranks; none of their processes outlives the `with`."""
        launcher = ["scripts.launch", "--standalone", "--nproc_per_node", str(place.ranks), "-m"]
        command = [sys.executable, "-m", *(launcher if place.ranks > 1 else []), module, *words]
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        with self.log.open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environ, cwd=soak.ROOT)
        try:
            yield process
        finally:
            members = soak.family(process)
            for member in members:
                with suppress(psutil.NoSuchProcess):
                    member.kill()
            process.wait()
            psutil.wait_procs(members, 10)

    def ended(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for the end of ranks. Raises Failed where it is no good one, or does not come."""
        try:
            code = process.wait(HANG_S)
        except subprocess.TimeoutExpired:
            raise Failed(f"no end within {HANG_S} s") from None
        if code:
            raise Failed(last_words(self.log.read_text()))

    def has_a_checkpoint(self, process: subprocess.Popen[bytes], run: Path) -> None:
        """Wait for a run's first checkpoint. Raises Failed where the run ends, or has none in time."""
        deadline = time.monotonic() + HANG_S
        while not any(run.glob("checkpoints/*/*")):
            if process.poll() is not None or time.monotonic() > deadline:
                raise Failed(last_words(self.log.read_text()))
            time.sleep(0.05)


def last_words(text: str) -> str:
    """Return the last line of an output, without escapes, the launcher's own left out."""
    lines = [line for line in text.splitlines() if line.strip() and not re.match(r"[=\-]{5}|\s|[EW]\d{4} ", line)]
    return lines[-1] if lines else "no word"


def work(at: tuple[int, int], lines: dict[str, list[str]], timed: bool) -> dict[str, str]:
    """Train runs on this rank, one after the other; return what was timed, if that is asked for.

    at: a Place. lines: train.py's command lines, by the run's name. Raises RuntimeError where a run ends badly.
    """
    from accelerate.state import AcceleratorState

    from loop.run.run import Run
    from scripts.watch import steps_watched
    from train import fit

    place = Place(*at)
    for name, line in lines.items():
        sys.argv = ["train.py", *line]
        AcceleratorState._reset_state()  # it would keep the first run's precision
        share = place.ranks > place.gpus > 0
        with Run(parse(line), share_gpus=share) as run, steps_watched() if name == "waits" else nullcontext():
            fit(run.config, run)
        if run.exit_code:
            raise RuntimeError(f"{name}: exit code {run.exit_code}")
    return time_loops(place) if timed else {}


def time_loops(place: Place) -> dict[str, str]:
    """Return, on these ranks, an epoch over a bare loop's, taken in turns, and the latency of an all-reduce."""
    import torch
    import torch.distributed as dist
    from accelerate.state import AcceleratorState

    from scripts.bench.__main__ import Flags as BenchFlags
    from scripts.bench.__main__ import interval, join
    from scripts.bench.loops import BARE, OURS, loops_of, take_turns
    from scripts.cost_model import seconds

    AcceleratorState._reset_state()
    setting = join(BenchFlags(device="cuda" if place.gpus else "cpu"), "softmax")
    loops = {name: make for name, make in loops_of(setting, ()).items() if name in (BARE, OURS)}
    taken = take_turns(setting, loops, dict.fromkeys(loops, ROUNDS))
    ratio, low, high = interval([taken[OURS], taken[BARE]])
    found = {"an epoch, over a bare loop's": f"{ratio:.2f} ({low:.2f} to {high:.2f}, n = {ROUNDS})"}
    if place.ranks > 1:
        row = torch.zeros(3, dtype=torch.float64, device=setting.device)

        def reduce() -> None:
            dist.all_reduce(row)
            float(row[0])  # waits for the device

        found["an all-reduce of 24 bytes"] = f"{1e6 * seconds(reduce, 200):.0f} us"
    return found


@dataclass(frozen=True)
class Flags:
    """The flags."""

    only: tuple[Part, ...] = get_args(Part)
    """Parts to verify."""
    worker: Path | None = None
    """Given by this program to the ranks that it starts on GPUs: train the runs of this file."""


@command
def main(flags: Flags) -> int:
    """Verify, print, write verify.json; return 1 where a claim fails."""
    if flags.worker:
        found = work(*json.loads(flags.worker.read_text()))
        if launched_rank() == 0:
            flags.worker.with_suffix(".found").write_text(json.dumps(found))
        return 0
    if not flags.only:
        raise InputError(f"--only: choose among {', '.join(get_args(Part))}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    import torch

    ensure_dataset(Config(), fetching=True)
    gpus, stopped = torch.cuda.device_count(), ""
    machine = {
        "CPU": hardware(),
        "GPUs": ", ".join(torch.cuda.get_device_name(gpu) for gpu in range(gpus)) or "none",
        "CUDA": torch.version.cuda if gpus else None,
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if gpus else None,
        **versions(("torch", "accelerate")),
    }
    print("; ".join(f"{name} {its}" for name, its in machine.items() if its), flush=True)
    print(TABLE.format("claim", "where", "measured", "bound", ""), flush=True)
    steps, left_out = plan(flags.only, gpus)
    with tempfile.TemporaryDirectory() as out, tqdm(total=len(steps), unit="launch", dynamic_ncols=True) as bar:
        verify = Verify(flags.only, Path(out), bar)
        try:
            for step, place in steps:
                bar.set_description(f"{step}, {place}")
                try:
                    getattr(verify, step)(place)
                except (Failed, subprocess.TimeoutExpired) as failed:
                    verify.state(f"{step}: the ranks end well", place, str(failed), "no error", False)
                bar.update()
        except KeyboardInterrupt:
            stopped = f"interrupted after {bar.n} of {len(steps)} launches"
        finally:  # after an error of this program, too
            verdicts = [row.holds for row in verify.rows if row.holds is not None]
            last = "; ".join([f"{sum(verdicts)} of {len(verdicts)} claims hold", *left_out, *[stopped] * bool(stopped)])
            kept = {"machine": machine, "rows": [asdict(row) for row in verify.rows], "result": last}
            write_whole(RESULT, json.dumps(kept, indent=1).encode())
    print(last)
    return 130 if stopped else 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
