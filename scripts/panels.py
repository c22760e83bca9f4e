"""What a comparison of runs shows: one list, drawn by `scripts.compare` and by `scripts.wandb_report`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Panel:
    """One set of curves over `examples`. key: a column of metrics.jsonl. logarithmic: of the y axis."""

    title: str
    key: str
    unit: str
    logarithmic: bool = False


@dataclass(frozen=True)
class Section:
    """A question about the runs, the config key that tells them apart, and the panels that answer it.

    text: markdown; formulas stand between $ signs, in LaTeX.
    """

    title: str
    group_by: str
    text: str
    panels: tuple[Panel, ...]


TRAIN_LOSS = Panel("Train loss", "train/loss", "nats an example", logarithmic=True)
TRAIN_ACC = Panel("Train accuracy", "train/acc", "share")
TEST_LOSS = Panel("Test loss", "test/loss", "nats an example", logarithmic=True)
TEST_ACC = Panel("Test accuracy", "test/acc", "share")
GRAD_NORM = Panel("Gradient norm, before clipping", "step/grad_norm", "2-norm", logarithmic=True)
LR_EFFECTIVE = Panel("Effective learning rate", "step/lr_effective", "of mean SGD", logarithmic=True)
DRIFT = Panel("Replica drift", "audit/replica_drift", "largest parameter difference")
THROUGHPUT = Panel("Throughput", "time/examples_per_s", "examples/s")

PANELS = (TRAIN_LOSS, TRAIN_ACC, TEST_LOSS, TEST_ACC, GRAD_NORM, LR_EFFECTIVE, DRIFT, THROUGHPUT)

SECTIONS = (
    Section(
        "Mean against sum",
        "reduction",
        "A step over $n$ examples follows $\\frac{1}{n}\\sum_i g_i$ for a mean and $\\sum_i g_i$ for a sum: $n$ times "
        "as long at the same learning rate. At $\\mathrm{lr}/n$ the two are one, but for the epoch's short last batch, "
        "where the sum's step shrinks with $n$ and the mean's does not.",
        (TRAIN_LOSS, TRAIN_ACC, TEST_ACC, GRAD_NORM, LR_EFFECTIVE),
    ),
    Section(
        "Tails: who gets the last batch",
        "tail",
        "The last batch of an epoch does not divide evenly. `spread` deals it evenly, `ragged` fills ranks in order, "
        "`pad` repeats the epoch's first examples, `drop` leaves it out. In a mean normalised by rank an example of "
        "rank $r$ weighs $\\frac{1}{WKn_r}$, so that the tail decides who counts; normalised globally it weighs "
        "$\\frac{1}{n}$.",
        (TRAIN_LOSS, TEST_LOSS, TEST_ACC),
    ),
    Section(
        "World sizes",
        "world_size",
        "With `--normalize global` every number of ranks $W$ takes one process's steps: the curves lie on one another. "
        "With `rank` a mean is a mean of means, and a sum is divided by $WK$.",
        (TRAIN_LOSS, TEST_ACC, THROUGHPUT),
    ),
    Section(
        "Normalisation",
        "normalize",
        "With `rank`, each rank back-propagates its mean $\\frac{1}{n_r}\\sum l$ (or its sum $\\sum l$), and the "
        "all-reduce makes of it a mean of means, $\\frac{1}{WK}\\sum_r\\frac{1}{n_r}\\sum_{i\\in r} g_i$. "
        "With `global`, it back-propagates $\\frac{WK}{n}\\sum l$ (or $WK\\sum l$), and the average is one process's "
        "step, $\\frac{1}{n}\\sum_i g_i$ (or $\\sum_i g_i$). Under `rank` the scratch updater divides by another "
        "number on every rank where shares differ, and the replicas drift apart.",
        (TRAIN_LOSS, TEST_ACC, GRAD_NORM, DRIFT),
    ),
)
