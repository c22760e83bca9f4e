"""The pages' blocks of measured text, out of the runs they are measured by. Links lead from the project's root."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from loop.config import Config
from loop.effect import divisors, effect
from loop.run import console
from loop.shards import Shards
from scripts.gallery import drawing, figures
from scripts.gallery.probes import distance, flags_of, last, pick
from scripts.machine import hardware
from scripts.runs import Run

WIDTH = 120
PICTURES = Path(__file__).parent / "pictures"


def versions() -> str:
    """Return hardware and torch, for a caption."""
    return f"{hardware()}, torch {torch.__version__.split('+')[0]}"


def train(runs: Mapping[str, Sequence[Run]]) -> str:
    """Return what `scripts/train.sh --reduction mean` says at its end; draw its curves."""
    run = pick(runs["train"])
    config, ranks = flags_of(run), int(run.config["world_size"])
    summary = {key: last(run, key) for key in run.curves} | {"epoch": int(last(run, "epoch"))}
    said = console.results(summary, 0) + "\n" + console.last_batch(config, shards_of(run))
    figure, (title, *_) = drawing.paint(figures.training, runs)
    drawing.save(figure, PICTURES / "train.png")
    return "\n".join(
        [
            "```text",
            *(textwrap.fill(line, WIDTH) for line in said.splitlines()),
            "```",
            "",
            f"![{title}: loss and accuracy](scripts/gallery/pictures/train.png)",
            "",
            f"*`bash scripts/train.sh --reduction mean`: softmax regression, {ranks} CPU ranks, n = 1 run.*",
        ]
    )


def modes(runs: Mapping[str, Sequence[Run]]) -> str:
    """Return the table of the modes on a last batch dealt as 64, 64, 0, 0."""
    rows = [run for study in ("modes-mean", "modes-sum", "modes-scratch") for run in runs[study]]
    rows = [run for run in rows if run.config["world_size"] != "1" or run.config["normalize"] == "global"]
    rows.sort(key=lambda run: run.config["updater"] == "scratch")
    some = flags_of(rows[0])
    table = "\n".join(
        f"| {label(run)} | {weight(run)} | {last_effect(run)} | {last(run, 'train/loss'):.4f} "
        f"| {last(run, 'test/acc'):.4f} |"
        for run in rows
    )
    caption = (
        f"*`OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 4 train.py --train-examples {some.train_examples} "
        f"--tail {some.tail}` with `--reduction sum --lr {Config().learning_rate / some.batch_size}`, "
        "`--normalize rank`, `--updater scratch --reduction sum` as the row says; "
        f"{some.net}, {some.epochs} epochs, {hardware()}, n = 1 run a row.*"
    )
    return (
        "| run | last step: weight of an example | effective lr | train loss | test accuracy |\n|---|---|---|---|---|\n"
        f"{table}\n\n{fill(caption)}"
    )


def label(run: Run) -> str:
    """Return a run's mode in words."""
    config, ranks = flags_of(run), int(run.config["world_size"])
    words = ["1 process" if ranks == 1 else f"{ranks} ranks"]
    words += ["the book's `sgd`"] * (config.updater == "scratch") + [config.reduction]
    if ranks > 1:
        words.append("**global**" if config.normalize == "global" else "rank")
    if config.lr is not None:
        default = Config().learning_rate
        words.append(f"lr {default}/{default / config.lr:g}")
    return ", ".join(words)


def weight(run: Run) -> str:
    """Return what an example of the run's last batch weighs: on each rank, where the replicas drift apart."""
    config, shards = flags_of(run), shards_of(run)
    sizes, ranks = shards.last_step.sizes, shards.world_size
    light, heavy, *_ = effect(config, sizes, ranks)
    words = in_ns(light) if light == heavy else f"{in_ns(light)} to {in_ns(heavy)}"
    still = [rank for rank, divisor in enumerate(divisors(config, sizes, ranks)) if divisor == 0]
    if not still:
        return words
    moving = [rank for rank in range(ranks) if rank not in still]
    return f"{words} on ranks {listed(moving)}; {listed(still)} stand still"


def in_ns(times_n: float) -> str:
    """Return a weight in units of 1/n."""
    return "1/n" if times_n == 1 else f"{times_n:g}/n"


def listed(ranks: Sequence[int]) -> str:
    """Return numbers as words: 0, 1 and 2."""
    *first, final = map(str, ranks)
    return f"{', '.join(first)} and {final}" if first else final


def last_effect(run: Run) -> str:
    """Return the effective learning rate of the epoch's last step."""
    shards = shards_of(run)
    return f"{effect(flags_of(run), shards.last_step.sizes, shards.world_size).lr_effective:g}"


def shards_of(run: Run) -> Shards:
    """Return the plan of the run's epochs."""
    return flags_of(run).shards(int(run.config["train_examples"]), int(run.config["world_size"]))


def exactness(runs: Mapping[str, Sequence[Run]]) -> str:
    """Return how far the weights of several ranks lie from one process's, in float64."""
    everything = [run for study in ("exact-mean", "exact-sum", "exact-scratch") for run in runs[study]]
    low, high = sorted({float(run.config["lr"]) for run in runs["exact-sum"]})
    off: dict[bool, list[float]] = {False: [], True: []}
    for run in everything:
        same = {key: run.config[key] for key in ("tail", "reduction", "updater", "lr")}
        too_long = same["reduction"] == "sum" and same["updater"] == "torch" and float(same["lr"]) == high
        if run.config["world_size"] != "1":
            off[too_long].append(distance(run, pick(everything, world_size=1, **same)))
    some, worlds = flags_of(everything[0]), sorted({int(run.config["world_size"]) for run in everything} - {1})
    tails = list(dict.fromkeys(run.config["tail"] for run in everything))
    cases = {12: "twelve"}.get(len(off[False]) // len(worlds), str(len(off[False]) // len(worlds)))
    return fill(
        f"In {some.dtype}, over {'two' if some.epochs == 2 else some.epochs} epochs of {some.train_examples} "
        f"examples at batch {some.batch_size}, the weights of {listed(worlds)} ranks lie within "
        f"{max(off[False]):.1e} (relative) of one process's in all {cases} cases of `global`: "
        f"{', '.join(tails[:-1])} and {tails[-1]}; mean and sum; both updaters. (The sum with `torch.optim` ran at "
        f"`--lr {low}`; at {high} its steps are {some.batch_size} times too long, and blow rounding up to "
        f"{max(off[True]):.0e}.) [tests/test_exactness.py](tests/test_exactness.py) holds that, with accumulation, "
        "momentum, AdamW and clipping, to 1e-12."
    )


def fill(text: str) -> str:
    """Return a paragraph in lines of README.md's length, no code or link cut in two."""
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)
