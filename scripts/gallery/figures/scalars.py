"""Claims 1 and 2: the gradient is zeroed, and a vector of losses becomes a scalar."""

from __future__ import annotations

from typing import get_args

from matplotlib.figure import Figure
from torch.nn import functional as F

from loop.book import BookUpdater
from loop.config import Config
from loop.data import EvalBatches
from loop.reduction import Normalize, Reduction
from scripts.gallery.drawing import Finding, curve, legend, panels
from scripts.gallery.probes import (
    BATCH,
    TAIL,
    NeverZeroed,
    Runs,
    applied_weights,
    book_losses,
    both_zeroings,
    data,
    first_examples,
    fresh,
    on_ranks,
    require,
)


def zeroing(figure: Figure, runs: Runs) -> Finding:
    """Zeroed, never zeroed; and zeroed too often where gradients are meant to accumulate."""
    train, _ = data()
    one, several = panels(
        figure, right="2 ranks, 4 micro-batches a step", xlabel="step", ylabel="train loss (nats per example)"
    )
    batches = EvalBatches(train, batch_size=BATCH)
    zeroed, never = (book_losses(kind, batches) for kind in (BookUpdater, NeverZeroed))
    after, before = on_ranks(2, both_zeroings, 4)
    tail = 50  # steps over which the end of the epoch is averaged
    ends = [sum(losses[-tail:]) / tail for losses in (zeroed, never, after, before)]
    for index, (label, losses) in enumerate({"zeroed every step": zeroed, "never zeroed": never}.items()):
        curve(one, index, range(1, len(losses) + 1), losses, label, marked=False)
    for index, (label, losses) in enumerate({"zeroed after the step": after, "before each backward": before}.items()):
        curve(several, index, range(1, len(losses) + 1), losses, label, marked=False)
    one.set_yscale("log")
    one.set_yticks([0.5, 1, 2, 4], ["0.5", "1", "2", "4"])
    one.minorticks_off()
    for axes in (one, several):
        legend(axes)
    require(ends[1] > 2 * ends[0] and ends[3] > 1.05 * ends[2], f"last losses of {ends}")
    return Finding(
        "Zero the gradient once a step",
        f"With the gradient zeroed every step, the last {tail} steps of an epoch of softmax regression lose "
        f"{ends[0]:.3f} on average; with the line forgotten every step applies the sum of all gradients so far, and "
        f"they lose {ends[1]:.3g}.",
        "Zeroing where the book does, before every backward, is no good once gradients are "
        "*meant* to accumulate: under Accelerate's `accumulate()` it throws away all micro-batches but the last, "
        f"which is still divided by K = 4. On 2 ranks that ends at {ends[3]:.3f} instead of {ends[2]:.3f}, and says "
        "nothing.",
    )


def scalar(figure: Figure, runs: Runs) -> Finding:
    """What an example weighs once the vector of losses has become a scalar: by autograd, on the last batch."""
    X, y = first_examples(TAIL)
    losses = F.cross_entropy(fresh("softmax")(X), y, reduction="none")
    try:
        losses.backward()
        refusal = "nothing"
    except RuntimeError as error:
        refusal = str(error)
    require("scalar" in refusal, f"a vector's backward raised {refusal}")
    sizes = Config(tail="ragged").shards(BATCH + TAIL, 4).steps[-1].sizes
    held = f"4 ranks hold {', '.join(map(str, sizes))}"
    pair = panels(
        figure, f"mean: {held}", f"sum: {held}", xlabel="example (its place in the last batch)",
        ylabel="weight in the step (one process's = 1)", ylim=(0, 1.1),
    )  # fmt: skip
    weights = {}
    for axes, reduction in zip(pair, get_args(Reduction), strict=True):
        exact = 1.0 if reduction == "sum" else 1 / TAIL
        alone = applied_weights(reduction, "rank", losses, [TAIL])
        off = float((alone / exact - 1).abs().max())
        for index, normalize in enumerate(get_args(Normalize)):
            dealt = weights[reduction, normalize] = applied_weights(reduction, normalize, losses, sizes) / exact
            off = max(off, float((dealt - 1).abs().max()) * (normalize == "global"))
            curve(axes, index, range(1, TAIL + 1), dealt.tolist(), f"{reduction}, {normalize}", marked=False)
        require(off < 1e-6, f"{reduction}: weights off by {off}")
        legend(axes, loc="center right", bbox_to_anchor=(1, 0.82))
    light, heavy, shared = (float(w) for w in (
        weights["mean", "rank"].min(), weights["mean", "rank"].max(), weights["sum", "rank"].max(),
    ))  # fmt: skip
    return Finding(
        "The scalar decides what an example weighs",
        f'Back-propagating the vector is refused ("{refusal}"). Its mean gives each of the last batch\'s {TAIL} '
        f"examples a weight of 1/{TAIL}, its sum a weight of 1: autograd's own derivatives.",
        f"{len(sizes)} ranks that hold {', '.join(map(str, sizes))} examples: a mean by rank gives {light:.3g}/n to "
        f"the examples of the full ranks and {heavy:.3g}/n to the others, a sum by rank {shared:.3g} to each. "
        "`global` leaves both scalars as they were.",
    )
