"""Regenerate every figure of scripts/gallery/pictures, and every measured block of the pages, from real runs.

    python -m scripts.gallery                           all of it: minutes on 2 cores
    python -m scripts.gallery --only lr drift modes     some of it

Runs are kept in OUT, in studies named gallery-...: a second call trains only what is not finished. After a change to
the code, remove them: rm -r runs/gallery-*.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from loop.config import InputError
from loop.files import write_whole
from scripts import sweep
from scripts.command import command
from scripts.runs import Run, read_runs

PICTURES = Path(__file__).parent / "pictures"
PAGE = PICTURES / "README.md"
PAGES = [sweep.ROOT / "README.md", sweep.ROOT / "loop" / "README.md", sweep.ROOT / "scripts" / "README.md", PAGE]
WHOLE = "made"  # the page's block on the gallery as a whole


class Study(NamedTuple):
    """A grid of runs, for the sweep."""

    world_sizes: Sequence[int]
    flags: str

    def command(self, name: str) -> str:
        """Return the command that trains it."""
        return f"python -m scripts.sweep --group gallery-{name} --world-size {spaced(self.world_sizes)} {self.flags}"


def spaced(values: Sequence[object]) -> str:
    """Return values as words of a command line."""
    return " ".join(map(str, values))


def powers_of_4(first: int, last: int) -> str:
    """Return learning rates 0.1 x 4^k: n = 4^4 and W = 4 keep them on the grid."""
    return spaced([f"{0.1 * 4.0**k:.10g}" for k in range(first, last + 1)])


AUDITED = "--log-every 1 --audit-every 1"
SHORT = "--train-examples 864 --tail ragged"  # three batches, and the book's last one
MODES = "--train-examples 896 --tail ragged --normalize global rank"  # three batches and a half
FULL = "--train-examples 12800 --epochs 2"  # 50 batches, none short
EXACT = "--dtype float64 --train-examples 1003 --batch-size 128 --epochs 2 --tail spread ragged drop"
ONE_AND_A_TAIL = "--train-examples 352 --tail ragged"  # one batch, and the book's last one
SIZES = "--tail ragged --epochs 3 --train-examples"
BOOKS = "352 1120 4192 16480 60000"  # all end on the book's last batch, 96 examples
HEROS = "385 897 4225 16513 59777"  # all end on the hero's, 129
SUM = "--reduction sum --lr 0.000390625"  # 0.1 / 256
OPTIMIZERS = {
    "sgd": ("--lr 0.1", "--lr {}"),
    "clip": ("--clip-norm 0.5 --lr 0.1", "--clip-norm 0.5 --lr {}"),
    "decay": ("--weight-decay 0.1 --lr 0.1", "--weight-decay 0.1 --lr {}"),
    "adamw": ("--optimizer adamw", "--optimizer adamw"),
}  # of mean, of sum

STUDIES = {
    "batch": Study([4], f"--normalize global rank --tail ragged --epochs 1 {AUDITED} "
                        "--train-examples 288 320 384 448 512"),
    "size-plain": Study([4], f"--normalize rank {SIZES} {BOOKS} {HEROS}"),
    "size-exact": Study([1], f"{SIZES} {BOOKS} {HEROS}"),
    "same-lr": Study([1, 2], "--net softmax mlp --reduction mean sum --normalize rank --epochs 3"),
    "divided-mean": Study([1, 4], f"--normalize rank {FULL} --log-every 1"),
    "divided-sum": Study([1, 4], f"--normalize rank {FULL} --log-every 1 --reduction sum --lr 0.000390625 0.0015625"),
    "lr-mean": Study([1, 2, 4], f"--net mlp --normalize rank {FULL} --lr {powers_of_4(-5, 3)}"),
    "lr-sum": Study([1, 2, 4], f"--net mlp --normalize rank {FULL} --reduction sum --lr {powers_of_4(-8, 0)}"),
    "drift-torch": Study([1], f"{SHORT} --log-every 1"),
    "drift": Study([1, 2, 3, 4], f"--updater scratch --reduction sum --normalize rank {SHORT} {AUDITED}"),
    "drift-exact": Study([4], f"--updater scratch --reduction sum {SHORT} {AUDITED}"),
    "drift-book": Study([4], "--updater scratch --reduction sum --normalize rank --tail ragged --epochs 3"),
    "tail-mean": Study([1, 4], f"--normalize rank {SHORT} --epochs 3 {AUDITED}"),
    "tail-sum": Study([1, 4], f"{SUM} --normalize rank {SHORT} --epochs 3 {AUDITED}"),
    "overlay": Study([1, 2, 4], f"--normalize global rank {SHORT} --dtype float64 --log-every 1"),
    "accumulate": Study([1, 4], f"--accumulate 1 2 4 8 16 --normalize rank {ONE_AND_A_TAIL} --epochs 3 {AUDITED}"),
    **{
        f"opt-{name}-{reduction}-w{w}": Study(
            [w], f"--reduction {reduction} --normalize rank {FULL} {flags.format(0.1 * w / 256)}"
        )
        for name, pair in OPTIMIZERS.items()
        for reduction, flags in zip(("mean", "sum"), pair, strict=True)
        for w in (1, 4)
    },
    "train": Study([2], "--reduction mean"),
    "modes-mean": Study([1, 4], MODES),
    "modes-sum": Study([1, 4], f"{MODES} {SUM}"),
    "modes-scratch": Study([4], f"{MODES} --updater scratch --reduction sum"),
    "exact-mean": Study([1, 2, 3, 4], f"{EXACT} --updater torch scratch"),
    "exact-sum": Study([1, 2, 3, 4], f"{EXACT} --reduction sum --lr 0.0005 0.1"),
    "exact-scratch": Study([1, 2, 3, 4], f"{EXACT} --reduction sum --updater scratch"),
}  # fmt: skip

FIGURES = {
    "hero": [],
    "zeroing": [],
    "scalar": [],
    "batch_size": ["batch"],
    "weights": [],
    "cost": ["size-plain", "size-exact"],
    "same_lr": ["same-lr"],
    "divided_lr": ["divided-mean", "divided-sum"],
    "lr": ["lr-mean", "lr-sum"],
    "metrics": ["size-exact"],
    "drift": ["drift-torch", "drift", "drift-exact", "drift-book"],
    "tail": ["tail-mean", "tail-sum"],
    "overlay": ["overlay"],
    "accumulation": ["accumulate"],
    "blow_up": ["lr-mean", "lr-sum"],
    "optimizers": [study for study in STUDIES if study.startswith("opt-")],
    "fp16": [],
    "bits": [],
}  # a function of scripts/gallery/figures: its studies
FRONT = ("hero", "cost")  # pictures of the README, without a number in their names
BLOCKS = {
    "train": ["train"],
    "modes": ["modes-mean", "modes-sum", "modes-scratch"],
    "exactness": ["exact-mean", "exact-sum", "exact-scratch"],
}  # a function of scripts/gallery/blocks.py: its studies
NEEDS: Mapping[str, Sequence[str]] = {**FIGURES, **BLOCKS}


@dataclass(frozen=True)
class Flags:
    """The flags."""

    out: Path = Path("runs")
    """Where runs are kept."""
    only: tuple[str, ...] = ()
    """Make only these figures and blocks. Default: all."""


@command
def main(flags: Flags) -> int:
    """Train what is missing, then draw and write."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: end the launch, too
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "disabled"}  # the same run on every machine
    return make(flags.only or list(NEEDS), flags.out, whole=not flags.only)


def make(names: Sequence[str], out: Path, whole: bool) -> int:
    """Make these figures and blocks; return 0, or what went wrong first as an exit code."""
    began = time.monotonic()
    for name in names:
        if name not in NEEDS:
            raise InputError(f"--only {name}: there is no such figure or block; choose from: {', '.join(NEEDS)}")
    places = {name: holding(name) for name in names}  # find out before training
    if not whole and (homeless := [name for name in names if not places[name]]):
        raise InputError(f"--only {homeless[0]}: no page has {begin(homeless[0])}: put it where the block belongs")
    names = [name for name in names if places[name]]
    for name in names:
        for page in places[name]:
            replaced(page, name, "")  # they are closed
    studies = list(dict.fromkeys(study for name in names for study in NEEDS[name]))
    planned = {study: planned_runs(study, out) for study in studies}
    everything = [run for runs in planned.values() for run in runs]
    fresh = whole and bool(everything) and not any(sweep.is_finished(run) for run in everything)
    if everything and (exit_code := sweep.run_all(everything, out, "gallery")):
        return exit_code
    runs = {study: read_runs(run.folder for run in members) for study, members in planned.items()}

    from scripts.gallery import blocks, probes  # torch: not before the runs are there

    wrong = []
    for name in tqdm(names, unit="figure", dynamic_ncols=True):
        try:
            text = exhibit(name, runs) if name in FIGURES else getattr(blocks, name)(runs)
        except probes.DoesNotHoldError as error:
            wrong.append(f"{name}: does not hold: {error}")
            continue
        for page in places[name]:
            write_whole(page, replaced(page, name, text).encode())
    if fresh and not wrong:
        minutes, seconds = divmod(round(time.monotonic() - began), 60)
        took = f"{len(everything)} runs and {len(FIGURES)} figures in {minutes} min {seconds} s on {blocks.versions()}."
        write_whole(PAGE, replaced(PAGE, WHOLE, took).encode())
    for line in wrong:
        print(f"scripts.gallery: error: {line}", file=sys.stderr)
    return 1 if wrong else 0


def planned_runs(study: str, out: Path) -> list[sweep.Planned]:
    """Return a study's runs to be."""
    world_sizes, flags = STUDIES[study]
    return sweep.plan([*flags.split(), "--out", str(out)], list(world_sizes), f"gallery-{study}")


def exhibit(name: str, runs: Mapping[str, Sequence[Run]]) -> str:
    """Draw a figure and return its block of the page: picture, finding, caption."""
    from scripts.gallery import blocks, drawing, figures

    draw: Callable[..., drawing.Finding] = getattr(figures, name)
    figure, (title, one, several) = drawing.paint(draw, runs)
    path = picture_of(name)
    drawing.save(figure, path)
    count = sum(len(runs[study]) for study in FIGURES[name])
    n = f"n = 1 run a point, {count} runs" if count else "arithmetic" if name in ("hero", "weights") else "n = 1"
    commands = "\n".join(STUDIES[study].command(study) for study in FIGURES[name])
    paragraphs = [
        f"![{title}]({path.relative_to(sweep.ROOT)})",
        blocks.fill(f"**One process.** {one}"),
        blocks.fill(f"**Several ranks.** {several}"),
        blocks.fill(f"*`python -m scripts.gallery --only {name}`; {n}; {blocks.versions()}.*"),
        f"<details><summary>Its runs</summary>\n\n```bash\n{commands}\n```\n\n</details>" if commands else "",
    ]
    return "\n\n".join(filter(None, paragraphs))


def picture_of(name: str) -> Path:
    """Return where a figure is kept."""
    numbered = [figure for figure in FIGURES if figure not in FRONT]
    stem = name if name in FRONT else f"gallery-{numbered.index(name) + 1:02}-{name.replace('_', '-')}"
    return PICTURES / f"{stem}.png"


def begin(name: str) -> str:
    """Return the marker above a block."""
    return f"<!-- gallery: {name} -->"


def holding(name: str) -> list[Path]:
    """Return the pages that have a place for a block."""
    return [page for page in PAGES if page.exists() and begin(name) in page.read_text(encoding="utf-8")]


def replaced(page: Path, name: str, text: str) -> str:
    """Return the page's text with what stands between a block's markers replaced. Raises InputError without markers.

    text: its links lead from the project's root; on the page they lead from the page's folder.
    """
    end = "<!-- end -->"
    before, begins, rest = page.read_text(encoding="utf-8").partition(begin(name))
    old, ends, after = rest.partition(end)
    if not (begins and ends) or "<!-- gallery:" in old:
        raise InputError(f"{page}: {begin(name)} ... {end} is not there, or not closed: put it where the block belongs")
    here = re.sub(r"(?<=\]\()(?!https?:|#)[^)]+", lambda link: os.path.relpath(sweep.ROOT / link[0], page.parent), text)
    return f"{before}{begin(name)}\n\n{here}\n\n{end}{after}"


if __name__ == "__main__":
    sys.exit(main())
