"""The gallery's figures: each function draws one, and returns what it found in numbers that it computed.

Left, one process; right, several ranks. A finding that does not hold is never drawn: `DoesNotHoldError` says what was
measured instead.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from accelerate.utils import GradScalerKwargs
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch.nn import functional as F

from loop.book import BookUpdater, evaluate
from loop.config import Config
from loop.data import EvalBatches
from loop.reduction import Normalize, Reduction, cell_loss
from loop.shards import Tail
from scripts.page import style
from scripts.probes import (
    BATCH,
    CLASSES,
    LR,
    TAIL,
    NeverZeroed,
    Runs,
    applied_weights,
    book_losses,
    both_zeroings,
    data,
    dead_units,
    distance,
    effect_cells,
    effect_of_tail,
    first_examples,
    fresh,
    gradient,
    in_nats,
    last,
    lost_in_float16,
    net_of,
    on_ranks,
    over,
    pick,
    reported_losses,
    require,
    shrunken,
    widest_gap,
)
from scripts.runs import Run


class Finding(NamedTuple):
    """What a figure shows. title: the finding, in a line or two. one, several: it in one process, on several ranks."""

    title: str
    one: str
    several: str


# ---- drawing


def panels(figure: Figure, left: str = "one process", right: str = "several ranks", **shared: Any) -> tuple[Axes, Axes]:
    """Return two axes side by side; `shared` goes to both, and with a ylabel the y axis is one."""
    pair = figure.subplots(1, 2, sharey="ylabel" in shared)
    for axes, title in zip(pair, (left, right), strict=True):
        axes.set_title(title, fontsize=9)
        axes.set(**shared)
        if "ylabel" in shared:
            axes.label_outer()
        axes.grid(alpha=0.4)
        axes.tick_params(labelsize=8)
        axes.xaxis.label.set_size(9)
        axes.yaxis.label.set_size(9)
    return pair[0], pair[1]


def curve(
    axes: Axes, index: int, xs: Sequence[float], ys: Sequence[float], label: str | None, marked: bool = True, **how: Any
) -> None:
    """Draw a curve in the style of its index, told apart without colours too."""
    colour, dash, width = style(index)
    line = (0, [length / 2 for length in dash]) if dash else "solid"
    marker = {"marker": "osD^vP"[index % 6], "markersize": 4} if marked else {}
    settings = {"color": colour, "linestyle": line, "linewidth": 1.8 * width, **marker, **how}
    axes.plot(xs, ys, label=label, **settings)


def legend(axes: Axes, **where: Any) -> None:
    """Explain the curves."""
    axes.legend(fontsize=7, handlelength=3, framealpha=0.8, **where)


def paint(draw: Callable[[Figure, Runs], Finding], runs: Runs) -> tuple[Figure, Finding]:
    """Return the figure that a function of this file draws, under its finding's title, and the finding."""
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    finding = draw(figure, runs)
    figure.suptitle(textwrap.fill(finding.title, 84, break_on_hyphens=False), fontsize=9.5)
    return figure, finding


def save(figure: Figure, path: Path) -> None:
    """Write a PNG, 900 pixels wide, in 64 colours: a third of the size, and no difference to the eye."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    with Image.open(picture) as image:
        image.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


# ---- claim 1


def zeroing(figure: Figure, runs: Runs) -> Finding:
    """Zeroed, never zeroed; and zeroed too often where gradients are meant to accumulate."""
    train, _ = data()
    one, several = panels(
        figure, right="2 ranks, 4 micro-batches a step", xlabel="step", ylabel="train loss (nats an example)"
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
        f"Without zeroing, an epoch ends at loss {ends[1]:.2g} instead of {ends[0]:.2g}; "
        f"zeroing at every micro-batch costs too: {ends[3]:.2f} instead of {ends[2]:.2f}",
        f"With the gradient zeroed every step, the last {tail} steps of an epoch of softmax regression lose "
        f"{ends[0]:.3f} on average; with the line forgotten every step applies the sum of all gradients so far, and "
        f"they lose {ends[1]:.3g}.",
        "Zeroing where the book does, before every backward, is no good once gradients are "
        "*meant* to accumulate: under Accelerate's `accumulate()` it throws away all micro-batches but the last, "
        f"which is still divided by K = 4. On 2 ranks that ends at {ends[3]:.3f} instead of {ends[2]:.3f}, and says "
        "nothing.",
    )


# ---- claim 2


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
    one, several = panels(
        figure, right="4 ranks, --tail ragged", xlabel=f"example of the last batch (n = {TAIL})", yscale="log",
        ylabel="its weight in the step", ylim=(2e-3, 3),
    )  # fmt: skip
    sizes = Config(tail="ragged").shards(BATCH + TAIL, 4).steps[-1].sizes
    weights = {}
    for index, (reduction, normalize) in enumerate(
        (reduction, normalize) for reduction in get_args(Reduction) for normalize in get_args(Normalize)
    ):
        alone = applied_weights(reduction, normalize, losses, [TAIL])
        weights[reduction, normalize] = dealt = applied_weights(reduction, normalize, losses, sizes)
        if normalize == "global":
            curve(one, index, range(1, TAIL + 1), alone.tolist(), reduction, marked=False)
        curve(several, index, range(1, TAIL + 1), dealt.tolist(), f"{reduction}, {normalize}", marked=False)
        exact = 1.0 if reduction == "sum" else 1 / TAIL
        off = max(float((alone - exact).abs().max()), float((dealt - exact).abs().max()) * (normalize == "global"))
        require(off < 1e-6, f"{reduction}, {normalize}: weights off by {off}")
    legend(one, loc="center right")
    legend(several, loc="center", bbox_to_anchor=(0.5, 0.44))
    light, heavy, shared = (float(w) for w in (
        weights["mean", "rank"].min() * TAIL, weights["mean", "rank"].max() * TAIL, weights["sum", "rank"].max(),
    ))  # fmt: skip
    return Finding(
        f"To make a scalar is to choose weights: 1/{TAIL} or 1 an example; a plain loop on 4 ranks "
        f"turns them into {light:.3g}/n or {heavy:.3g}/n, and {shared:.2g}",
        f'Back-propagating the vector is refused ("{refusal}"). Its mean gives each of the last batch\'s {TAIL} '
        f"examples a weight of 1/{TAIL}, its sum a weight of 1: autograd's own derivatives.",
        f"{len(sizes)} ranks that hold {', '.join(map(str, sizes))} examples: a mean by rank gives {light:.3g}/n to "
        f"the examples of the full ranks and {heavy:.3g}/n to the others, a sum by rank {shared:.3g} to each. "
        "`global` leaves both scalars as they were.",
    )


# ---- claim 3


def batch_size(figure: Figure, runs: Runs) -> Finding:
    """The step's length over the batch's size: gradients at the first weights, and audited last steps of 4 ranks."""
    one, several = panels(figure, right="4 ranks, --tail ragged", xlabel="examples in the batch, n")
    net, sizes = fresh("softmax"), [2**k for k in range(4, 13)]
    norms: dict[str, list[float]] = {"mean": [], "sum": []}
    for n in sizes:
        X, y = first_examples(n)
        for reduction, values in norms.items():
            values.append(float(gradient(net, F.cross_entropy(net(X), y, reduction=reduction)).norm()))
    for index, (reduction, values) in enumerate(norms.items()):
        curve(one, index, sizes, values, reduction)
    one.set(xscale="log", yscale="log", ylabel="length of the first gradient")
    one.set_xscale("log", base=2)
    legend(one)
    change = {reduction: max(values) / min(values) for reduction, values in norms.items()}
    predicted = range(4, BATCH + 1)
    several.plot(
        predicted,
        [effect_of_tail(4, n).length for n in predicted],
        color="0.6",
        linewidth=3,
        label="predicted, by rank",
    )
    measured: dict[str, list[float]] = {}
    for index, normalize in enumerate(("global", "rank")):
        audited = [run for run in runs["batch"] if run.config["normalize"] == normalize]
        n = [int(run.config["tail_examples"]) or BATCH for run in audited]
        measured[normalize] = [last(run, "audit/grad_scale") for run in audited]
        curve(several, index, n, measured[normalize], f"mean, {normalize}: measured", linestyle="")
    several.set(ylabel="length of the step / exact mean's", ylim=(0, 1.15))
    legend(several, loc="lower right")
    off = max(abs(value - 1) for value in measured["global"])
    least = min(measured["rank"])
    require(change["mean"] < 4 and off < 1e-6 and abs(least - 0.25) < 0.01, f"{change}, {measured}")
    return Finding(
        f"From n = {sizes[0]} to {sizes[-1]} the mean's step changes {change['mean']:.2g}-fold, the sum's "
        f"{change['sum']:.0f}-fold; on 4 ranks a short batch gets down to {least:.2g} of a mean's",
        f"From {sizes[0]} to {sizes[-1]} examples the length of the mean's gradient changes {change['mean']:.2f}-fold "
        f"(noise averages out), the sum's {change['sum']:.0f}-fold.",
        f"A mean by rank depends on the batch size again: where some ranks are empty they are averaged in, down to "
        f"{least:.3g} of the exact step at {min(n)} examples. `global` is off by {off:.1g} at most.",
    )


def weights(figure: Figure, runs: Runs) -> Finding:
    """Who counts how much in the book's last batch, from 1 to 64 ranks; and what that does to a trained net."""
    one, several = panels(figure, f"1 to 64 ranks: the last {TAIL} examples", "4 ranks: the trained weights")
    ranks = [2**k for k in range(7)]
    tails: tuple[Tail, ...] = ("spread", "ragged")
    for index, tail in enumerate(tails):
        effects = [effect_of_tail(world_size, tail=tail) for world_size in ranks]
        curve(one, index, ranks, [e.heaviest for e in effects], f"{tail}: heaviest")
        curve(one, index + 2, ranks, [e.lightest for e in effects], f"{tail}: lightest")
    one.set_xscale("log", base=2)
    one.set_xticks(ranks, list(map(str, ranks)))
    one.set(xlabel="ranks, W", ylabel="weight of an example, times n", ylim=(0, 2.1))
    legend(one, loc="upper left")
    four, most = effect_of_tail(4), effect_of_tail(64, tail="spread")
    sizes, moved = [], []
    for plain in sorted(runs["size-plain"], key=lambda run: int(run.config["train_examples"])):
        sizes.append(int(plain.config["train_examples"]))
        moved.append(100 * distance(plain, pick(runs["size-exact"], train_examples=sizes[-1])))
    curve(several, 0, sizes, moved, "ragged, mean by rank")
    several.set(xscale="log", yscale="log", xlabel="training examples, N", ylabel="weights off after 3 epochs (%)")
    require(moved[0] > moved[-1], f"off by {moved} % at {sizes}")
    return Finding(
        f"On 4 ranks a plain loop counts the last {TAIL} examples {four.lightest:.2g} to {four.heaviest:.2g} times, "
        f"and trains weights {moved[-1]:.2g} % off at N = {sizes[-1]}, {moved[0]:.2g} % at {sizes[0]}",
        "Every example of the last batch weighs 1/n.",
        f"Dealt raggedly to 4 ranks an example counts {four.lightest:.3g} to {four.heaviest:.3g} times what it "
        f"should; spread over 64, {most.lightest:.3g} to {most.heaviest:.3g} times. On the book's {sizes[-1]} "
        f"examples that is one step in {math.ceil(sizes[-1] / BATCH)} and moves the weights by {moved[-1]:.2g} % in "
        f"3 epochs; where it is one step in 2 (N = {sizes[0]}), by {moved[0]:.2g} %.",
    )


# ---- claim 4


def same_lr(figure: Figure, runs: Runs) -> Finding:
    """Sum at the mean's learning rate: softmax regression and the mlp."""
    pair = panels(figure, right="2 ranks, a plain loop", xlabel="epoch", ylabel="test accuracy", ylim=(0, 1))
    final = {}
    for axes, world_size in zip(pair, (1, 2), strict=True):
        for index, (net, reduction) in enumerate((n, r) for n in ("softmax", "mlp") for r in ("mean", "sum")):
            run = pick(runs["same-lr"], world_size=world_size, net=net, reduction=reduction)
            curve(axes, index, *over(run, "epoch", "test/acc"), f"{net}, {reduction}")
            axes.set_xticks(over(run, "epoch", "test/acc")[0])
            final[world_size, net, reduction] = run
    legend(pair[0], loc="center left")
    softmax, mlp = final[1, "softmax", "sum"], final[1, "mlp", "sum"]
    accuracy = {key: last(run, "test/acc") for key, run in final.items()}
    shrunk_loss, shrunk = shrunken(net_of(softmax), 1 / BATCH)
    dead = dead_units(net_of(mlp))
    kept = evaluate(net_of(softmax), EvalBatches(data()[1]))[1]
    require(shrunk == kept, f"accuracy {kept} became {shrunk} when the weights were scaled")
    require(accuracy[1, "softmax", "sum"] > 0.7 and accuracy[1, "mlp", "sum"] < 0.2, f"accuracies {accuracy}")
    return Finding(
        f"Sum at the mean's lr {LR}: the mlp ends at accuracy {accuracy[1, 'mlp', 'sum']:.2f}, softmax regression "
        f"keeps {accuracy[1, 'softmax', 'sum']:.2f} at a train loss of {last(softmax, 'train/loss'):.0f}",
        f"Softmax regression reaches a test accuracy of {accuracy[1, 'softmax', 'mean']:.3f} by mean and "
        f"{accuracy[1, 'softmax', 'sum']:.3f} by sum, whose test loss is {last(softmax, 'test/loss'):.3g}: its "
        "logits are linear in its weights, so to make those large costs loss, and does not change which is largest. "
        f"Dividing all its weights by {BATCH} leaves the accuracy at {shrunk:.4f}, to the last example, and the loss "
        f"at {shrunk_loss:.2g}. The mlp has a bend to fall over: {100 * dead:.0f} % of its hidden units are 0 for "
        f"every test image, and it guesses ({accuracy[1, 'mlp', 'sum']:.2f}, where the mean has "
        f"{accuracy[1, 'mlp', 'mean']:.2f}).",
        f"A plain loop on 2 ranks makes the sum's step half as long, {BATCH // 2} times the mean's: softmax regression "
        f"ends at {accuracy[2, 'softmax', 'sum']:.3f}, the mlp at {accuracy[2, 'mlp', 'sum']:.2f}.",
    )


def divided_lr(figure: Figure, runs: Runs) -> Finding:
    """Sum at lr/n on top of the mean, where every batch is full; on 4 ranks it takes 4 times that."""
    pair = panels(figure, right="4 ranks, a plain loop", xlabel="step", ylabel="train loss (nats an example)")
    gaps = {}
    for axes, world_size in zip(pair, (1, 4), strict=True):
        mean = pick(runs["divided-mean"], world_size=world_size)
        steps, wanted = over(mean, "step", "step/loss")
        axes.plot(steps, wanted, color="0.7", linewidth=5, label=f"mean, lr {LR}")
        for index, times in enumerate((1, 4)):
            run = pick(runs["divided-sum"], world_size=world_size, lr=LR / BATCH * times)
            _, values = over(run, "step", "step/loss")
            gaps[world_size, times] = widest_gap(values, wanted)
            label = f"sum, lr {LR}/{BATCH}" if times == 1 else f"sum, lr {LR} x 4/{BATCH}"
            if times <= world_size:
                curve(axes, index, steps, values, label, marked=False)
        legend(axes)
    require(gaps[1, 1] < 1e-4 and gaps[4, 4] < 1e-4 and gaps[4, 1] > 0.1, f"gaps {gaps}")
    return Finding(
        f"At lr/n the sum takes the mean's steps, {in_nats(gaps[1, 1])}; on 4 ranks it lags by {gaps[4, 1]:.2f} nats, "
        f"and wants 4 lr/n: {in_nats(gaps[4, 4])}",
        f"Softmax regression, {len(steps)} full batches: between mean at lr {LR} and sum at lr {LR}/{BATCH} every "
        f"step's loss agrees {in_nats(gaps[1, 1])}. (Dividing by {BATCH}, a power of two, rounds nothing.)",
        f"The all-reduce averages, so the gradient of the sum is n/W times the mean's: at lr/n the loss lags by up to "
        f"{gaps[4, 1]:.3f}, at 4 lr/n it agrees {in_nats(gaps[4, 4])}.",
    )


def by_lr(runs: Runs, reduction: str, world_size: int) -> dict[float, Run]:
    """Return the grid's runs of a reduction on so many ranks, by their learning rate, in order."""
    chosen = [run for run in runs[f"lr-{reduction}"] if run.config["world_size"] == str(world_size)]
    return dict(sorted((float(run.config["lr"]), run) for run in chosen))


def lr(figure: Figure, runs: Runs) -> Finding:
    """Accuracy over the learning rate: six curves, which are one over the effective learning rate."""
    left, right = panels(
        figure, "over --lr", "over the effective lr", xscale="log", ylabel="test accuracy", ylim=(0, 1)
    )
    left.set_xlabel("--lr")
    right.set_xlabel("--lr x length of the step / exact mean's")
    at: dict[float, list[float]] = {}
    best: dict[tuple[str, int], float] = {}
    for index, (reduction, world_size) in enumerate((r, w) for r in ("mean", "sum") for w in (1, 2, 4)):
        grid = by_lr(runs, reduction, world_size)
        lrs, values = list(grid), [last(run, "test/acc") for run in grid.values()]
        effective = [last(run, "step/lr_effective") for run in grid.values()]
        best[reduction, world_size] = max(zip(values, lrs, strict=True))[1]
        for x, value in zip(effective, values, strict=True):
            at.setdefault(float(f"{x:.6g}"), []).append(value)
        for axes, xs in ((left, lrs), (right, effective)):
            curve(axes, index, xs, values, f"{reduction}, W = {world_size}")
    legend(right, loc="upper left")
    spread = {x: max(values) - min(values) for x, values in at.items() if len(values) > 1}
    gap = max(width for x, width in spread.items() if x <= best["mean", 1])
    ratio = {w: best["mean", w] / best["sum", w] for w in (1, 2, 4)}
    require(gap < 0.02 and ratio[1] == BATCH and ratio[4] == BATCH / 4, f"gap {gap}, best lr's ratios {ratio}")
    return Finding(
        f"The sum's best lr is 1/{ratio[1]:.0f} of the mean's in one process, 1/{ratio[4]:.0f} on 4 ranks: "
        "the factor is n/W; over the effective lr the six curves are one, up to its best",
        f"The mlp learns best at lr {best['mean', 1]:.3g} by mean and {best['sum', 1]:.3g} by sum: n = {BATCH} apart.",
        "The mean's curve stays where it is for W = 1, 2, 4; a plain loop's sum moves right by W (best on 4 ranks: "
        f"{best['sum', 4]:.3g}). Over the effective lr, runs at the same value agree to {gap:.4f} of accuracy up to "
        f"the best one; beyond it they part by up to {max(spread.values()):.2f}: there training is chaotic, and "
        "rounding, which differs with W, decides.",
    )


# ---- claim 5


def metrics(figure: Figure, runs: Runs) -> Finding:
    """How wrong a reported loss is: sums over examples against means of means, over data sets that end on 96."""
    one, several = panels(
        figure, right="averaged over the ranks' averages", xscale="log", yscale="log", xlabel="training examples, N",
        ylabel="reported loss off by (relative)",
    )  # fmt: skip
    net = net_of(pick(runs["size-exact"], train_examples=BATCH + TAIL))
    with torch.no_grad():
        losses = F.cross_entropy(net(first_examples(60_000)[0]), data()[0].labels, reduction="none")
    sizes = [BATCH * k + TAIL for k in (1, 2, 4, 8, 16, 32, 64, 128, 234)]
    off: dict[str, list[float]] = {}
    for n in sizes:
        for name, values in reported_losses(losses[:n]).items():
            off.setdefault(name, []).append(max(values))
    for index, (name, values) in enumerate(off.items()):
        curve(several if "ranks" in name else one, index % 2 if index < 2 else index - 2, sizes, values, name)
    for axes in (one, several):
        legend(axes)
    exact, batches, *_ = off.values()
    require(max(exact) < 1e-6 < batches[-1], f"off by {off}")
    return Finding(
        f"float(l) x len(y) is right to {max(exact):.0e}; a mean of batches' means is up to {100 * max(batches):.1f} % "
        f"off, a mean of 4 ranks' means up to {100 * max(off['4 ranks']):.1f} %",
        f"Added up as float(l) x len(y), the loss is off by {max(exact):.1g} at most, one float32 rounding a batch. A "
        f"mean of the batches' means is off by up to {100 * max(batches):.2g} % at N = {sizes[0]} and "
        f"{100 * batches[-1]:.2g} % at {sizes[-1]}.",
        f"Each rank's own loss is right for that rank, and their average is wrong for the job: by up to "
        f"{100 * max(off['4 ranks']):.2g} % at N = {sizes[0]} on 4 ranks, {100 * off['4 ranks'][-1]:.2g} % at "
        f"{sizes[-1]}. Here the sums are reduced, not the means.",
    )


# ---- claim 6


def drift(figure: Figure, runs: Runs) -> Finding:
    """The book's updater: the torch optimiser's twin in one process; on several ranks its replicas part."""
    one, several = panels(figure, right="between replicas", xlabel="step")
    torch_mean, scratch = (pick(runs[study], world_size=1) for study in ("drift-torch", "drift"))
    steps, wanted = over(torch_mean, "step", "step/loss")
    values = over(scratch, "step", "step/loss")[1]
    one.plot(steps, wanted, color="0.7", linewidth=5, label="torch.optim, mean")
    curve(one, 1, steps, values, "the book's sgd, sum", marked=False)
    one.set_ylabel("train loss (nats an example)")
    apart = {}
    for index, world_size in enumerate((2, 3, 4)):
        run = pick(runs["drift"], world_size=world_size, normalize="rank")
        apart[world_size] = over(run, "step", "audit/replica_drift")[1]
        curve(several, index, steps, apart[world_size], f"W = {world_size}, rank", marked=False)
    together = over(pick(runs["drift-exact"]), "step", "audit/replica_drift")[1]
    curve(several, 3, steps, together, "W = 4, global", marked=False)
    several.set_ylabel("largest parameter difference")
    for axes in (one, several):
        legend(axes)
    gap, book = widest_gap(values, wanted), last(pick(runs["drift-book"]), "audit/replica_drift")
    jumps = [step for step, a, b in zip(steps[1:], apart[4], apart[4][1:], strict=False) if b - a > 0.01 * apart[4][-1]]
    require(all(step % 4 == 0 for step in jumps), f"the replicas part at steps {jumps}")
    require(gap < 1e-5 and apart[4][-1] > 0 and max(together) == 0, f"gap {gap}, drift {apart}, {together}")
    worst = max(apart, key=lambda world_size: apart[world_size][-1])
    return Finding(
        "The book's sgd is torch's in one process; on several ranks its replicas part at every short batch, "
        f"up to {apart[worst][-1]:.2g} after {steps[-1]:.0f} steps (W = {worst})",
        "Handed the batch size, the book's `sgd` on a summed loss takes `torch.optim.SGD`'s steps on the mean: no "
        f"loss differs by more than {gap:.1g}, the short batches included.",
        f"Each rank divides by its own share: on 4 ranks the replicas part further at {len(jumps)} of {len(steps)} "
        "steps, the epochs' short last ones, and keep their distance in between (3 ranks cannot divide the batch "
        f"evenly, and divide by different numbers at every step); nothing is said. After {steps[-1]:.0f} steps a "
        f"parameter differs by {apart[2][-1]:.2g}, {apart[3][-1]:.2g}, {apart[4][-1]:.2g} on 2, 3, 4 ranks; "
        f"{max(together):g} under `global`. On all 60000 examples, 3 epochs, 4 ranks it is {book:.2g}: one step in "
        "235.",
    )


# ---- claim 7


def tail(figure: Figure, runs: Runs) -> Finding:
    """The length of each step, where every fourth batch is the book's last one."""
    pair = panels(
        figure,
        right="4 ranks, a plain loop",
        xlabel="step",
        ylabel=f"length of the step / mean's at lr {LR}",
        ylim=(0, 1.2),
    )
    lengths = {}
    for axes, world_size in zip(pair, (1, 4), strict=True):
        for index, reduction in enumerate(("mean", "sum")):
            run = pick(runs[f"tail-{reduction}"], world_size=world_size)
            steps, scales = over(run, "step", "audit/grad_scale")
            values = [scale * float(run.config["lr"]) / LR for scale in scales]
            lengths[reduction, world_size] = values[3]
            label = f"{reduction}, lr {LR}" if reduction == "mean" else f"{reduction}, lr {LR}/{BATCH}"
            curve(axes, index, steps, values, label)
    legend(pair[0], loc="lower right")
    share = TAIL / BATCH
    off = max(abs(lengths["mean", 1] - 1), abs(lengths["sum", 1] - share), abs(lengths["sum", 4] - share / 4))
    require(off < 1e-4 and lengths["mean", 4] < 0.8, f"lengths {lengths}")
    return Finding(
        f"On a batch of {TAIL} the mean steps as far as ever, the sum {lengths['sum', 1]:.3g} times as far; a plain "
        f"loop on 4 ranks makes that {lengths['mean', 4]:.2g} and {lengths['sum', 4]:.2g}",
        f"On the short batch ({TAIL} of {BATCH}) the mean's step is {lengths['mean', 1]:.3g} of the exact mean's, "
        f"and an example weighs {1 / share:.3g} times as much as in a full batch: the step is steady, the weights "
        f"are not. The sum's is {lengths['sum', 1]:.3g}, and every example of the epoch weighs the same.",
        f"Dealt as 64, 32, 0, 0 the mean's short step is {lengths['mean', 4]:.3g} of what it should be: there a "
        f"plain mean is no steadier than a sum. The sum's is {lengths['sum', 4]:.3g}, W times too short as all its "
        "steps are.",
    )


def overlay(figure: Figure, runs: Runs) -> Finding:
    """W = 1, 2, 4 on top of each other under global, and by rank."""
    pair = panels(
        figure, "--normalize global", "--normalize rank", xlabel="step", ylabel="train loss (nats an example)"
    )
    gaps, off = {}, {}
    for axes, normalize in zip(pair, ("global", "rank"), strict=True):
        alone = pick(runs["overlay"], world_size=1, normalize=normalize)
        wanted = over(alone, "step", "step/loss")[1]
        for index, world_size in enumerate((1, 2, 4)):
            run = pick(runs["overlay"], world_size=world_size, normalize=normalize)
            steps, values = over(run, "step", "step/loss")
            width = 5.0 if world_size == 1 else 1.6
            colour = {"color": "0.7"} if world_size == 1 else {}
            curve(axes, index, steps, values, f"W = {world_size}", marked=False, linewidth=width, **colour)
            gaps[normalize, world_size] = widest_gap(values, wanted)
            off[normalize, world_size] = distance(run, alone)
        legend(axes)
    exact = max(off["global", world_size] for world_size in (2, 4))
    require(exact < 1e-12 and gaps["rank", 4] > 0.01, f"gaps {gaps}, weights off by {off}")
    return Finding(
        f"global: W = 1, 2, 4 are one curve, their weights within {exact:.0e}; by rank 4 ranks part by "
        f"{gaps['rank', 4]:.2f} nats, the weights by {100 * off['rank', 4]:.2g} %",
        f"In grey, and the same in both panels: {len(steps)} steps, every fourth on the book's {TAIL} examples.",
        f"Under `global` the final weights of 2 and 4 ranks are within {exact:.1g} (relative, float64) of one "
        f"process's and no step's loss differs by more than {max(gaps['global', 2], gaps['global', 4]):.1g}. By rank "
        f"they are {100 * off['rank', 2]:.2g} % and {100 * off['rank', 4]:.2g} % off, a step's loss by up to "
        f"{gaps['rank', 2]:.2g} and {gaps['rank', 4]:.2g}.",
    )


def accumulation(figure: Figure, runs: Runs) -> Finding:
    """The last batch's step over the micro-batches in a step: predicted, and audited."""
    pair = panels(
        figure, right="4 ranks", xlabel="micro-batches in a step, K", ylabel="length of the last step / exact mean's",
        ylim=(0, 1.1),
    )  # fmt: skip
    measured, ks, loss = {}, [1, 2, 4, 8, 16], {}
    for axes, world_size in zip(pair, (1, 4), strict=True):
        predicted = [effect_of_tail(world_size, accumulate=k).length for k in ks]
        chosen = [pick(runs["accumulate"], world_size=world_size, accumulate=k) for k in ks]
        found = [run.curves["audit/grad_scale"][1][1] for run in chosen]  # of the second step, the first epoch's last
        measured[world_size], loss[world_size] = found, [last(run, "train/loss") for run in chosen]
        axes.plot(ks, predicted, color="0.7", linewidth=5, label="predicted")
        curve(axes, 0, ks, found, "measured", linestyle="")
        axes.set_xscale("log", base=2)
        axes.set_xticks(ks, list(map(str, ks)))
        legend(axes, loc="upper right")
        off = widest_gap(found, predicted)
        require(off < 0.05, f"W = {world_size}: measured {found}, predicted {predicted}")
    return Finding(
        f"Accumulation under-weighs the tail: with K = 16 the last {TAIL} examples take {measured[1][-1]:.2g} of "
        f"their step in one process, {measured[4][-1]:.2g} on 4 ranks",
        f"K micro-batches are averaged, empty ones too: the last {TAIL} examples fill {effect_cells(1, 16)} of 16, and "
        f"their step is {measured[1][-1]:.3g} of the exact mean's. That is the loop of one process, without any rank: "
        f"after 3 epochs of {BATCH + TAIL} examples the train loss is {loss[1][-1]:.3f} instead of {loss[1][0]:.3f}.",
        f"Ranks and micro-batches are cells alike: 4 ranks start at {measured[4][0]:.3g} for K = 1 and end at "
        f"{measured[4][-1]:.3g} for K = {ks[-1]}, where one process ends as well. (Where cells are unequal the short "
        "one's gradient is noisier, so the step is a little longer than the examples' weights add up to.)",
    )


# ---- claim 8


def blow_up(figure: Figure, runs: Runs) -> Finding:
    """Train loss over the learning rate: faster, then gone."""
    pair = panels(
        figure, right="4 ranks, a plain loop", xscale="log", xlabel="--lr",
        ylabel="train loss, last of 2 epochs (nats)",
    )  # fmt: skip
    guessing, gone = math.log(CLASSES), {}
    losses: dict[tuple[str, int], dict[float, float]] = {}
    for axes, world_size in zip(pair, (1, 4), strict=True):
        for index, reduction in enumerate(("mean", "sum")):
            of_lr = {x: last(run, "train/loss") for x, run in by_lr(runs, reduction, world_size).items()}
            curve(axes, index, list(of_lr), list(of_lr.values()), reduction)
            best = min(of_lr, key=of_lr.__getitem__)
            gone[reduction, world_size] = min(x for x in of_lr if x > best and not of_lr[x] < guessing)
            losses[reduction, world_size] = of_lr
        axes.axhline(guessing, color="0.5", linewidth=1, linestyle=":")
        axes.text(1e-6, guessing * 1.01, "guessing", fontsize=7, color="0.3", va="bottom")
    legend(pair[0])
    by_sum, by_mean, at = max(
        ((losses["sum", 1][x], y, x) for x, y in losses["mean", 1].items() if x in losses["sum", 1]),
        key=lambda pair: pair[1] - pair[0],
    )
    require(gone["sum", 1] < gone["mean", 1] and by_sum < by_mean, f"worse than guessing from lr {gone}")
    return Finding(
        f"At lr {at:.2g} the sum reaches {by_sum:.2f} where the mean is at {by_mean:.2f}; "
        f"from {gone['sum', 1]:.2g} on it is worse than guessing, the mean from {gone['mean', 1]:.2g}",
        f"100 steps of the mlp: at lr {at:.3g} the sum's train loss is {by_sum:.3f}, the mean's {by_mean:.3f}. At lr "
        f"{gone['sum', 1]:.3g} the sum is worse than guessing (ln {CLASSES}); the mean holds out until "
        f"{gone['mean', 1]:.3g}.",
        f"On 4 ranks a plain loop's sum takes steps n/W as long: it is gone from lr {gone['sum', 4]:.3g} on, "
        f"{gone['sum', 4] / gone['sum', 1]:.3g} times as high; the mean from {gone['mean', 4]:.3g}, as before. A rate "
        "tuned on 4 ranks is W times too high for one process.",
    )


# ---- beyond plain SGD


def optimizers(figure: Figure, runs: Runs) -> Finding:
    """Mean against sum at the learning rate that makes them equal under SGD: what else is scale-free?"""
    names = {"sgd": "SGD", "clip": "clipping", "decay": "weight\ndecay", "adamw": "AdamW"}
    pair = panels(figure, right="4 ranks, a plain loop", ylabel="weights of sum off mean's (relative)", yscale="log")
    off: dict[int, list[float]] = {}
    loss = {}
    for axes, world_size in zip(pair, (1, 4), strict=True):
        off[world_size] = []
        for name in names:
            mean, by_sum = (pick(runs[f"opt-{name}-{r}-w{world_size}"]) for r in ("mean", "sum"))
            off[world_size].append(distance(by_sum, mean))
            loss[name, world_size] = last(mean, "train/loss"), last(by_sum, "train/loss")
        bars = axes.bar(range(len(names)), off[world_size], color=[style(i)[0] for i in range(len(names))], width=0.6)
        for bar, hatch in zip(bars, ("", "///", "...", "xx"), strict=True):
            bar.set(hatch=hatch, edgecolor="white")
        axes.bar_label(bars, [f"{value:.0e}" if value else "" for value in off[world_size]], fontsize=7)
        for i in (i for i, value in enumerate(off[world_size]) if not value):
            axes.text(i, 1.5e-8, "0", ha="center", fontsize=7)
        axes.set_xticks(range(len(names)), list(names.values()), fontsize=7)
        axes.set_ylim(1e-8, 10)
    sgd, clip, decay, adamw = off[1]
    require(sgd < 1e-4 < min(clip, decay) and adamw < 0.1 * min(clip, decay), f"off by {off}")
    return Finding(
        f"At lr/n sum and mean agree under SGD ({sgd:.2g} apart); clipping ({clip:.0%}) and weight decay ({decay:.0%}) "
        f"undo that; AdamW hardly notices a sum at all ({adamw:.2%})",
        f"Clipped to norm 0.5, the sum's gradient, {BATCH} times as long, is cut to the same length before lr/n "
        f"makes its step {BATCH} times too short: train loss {loss['clip', 1][1]:.2f} instead of "
        f"{loss['clip', 1][0]:.2f}. Weight decay 0.1 is multiplied by lr/n, too, and all but switched off: "
        f"{loss['decay', 1][1]:.3f} instead of {loss['decay', 1][0]:.3f}. AdamW divides by the gradient's own size: "
        f"at the same lr the weights are {adamw:.2%} apart, by its eps.",
        "A plain loop's sum at 4 lr/n: the same within "
        f"{max(abs(a - b) for a, b in zip(*off.values(), strict=True)):.1g} (SGD {off[4][0]:.2g}, AdamW "
        f"{off[4][3]:.2%}). `global` makes W irrelevant and leaves these differences between sum and mean standing: "
        "they are one process's own.",
    )


def fp16(figure: Figure, runs: Runs) -> Finding:
    """The share of a gradient's entries that float16 cannot hold, over the loss scale: CPU casts, no fp16 run."""
    initial = GradScalerKwargs().init_scale
    pair = panels(
        figure, right="4 ranks: rank 0's own gradient", xlabel="loss scale", yscale="log", ylim=(1e-3, 130),
        ylabel="entries lost in float16 (%)",
    )  # fmt: skip
    net, (X, y), powers = fresh("mlp"), first_examples(BATCH), range(25)
    fits: dict[tuple[str, str, int], int] = {}
    lost: dict[tuple[str, str, int], float] = {}
    for axes, world_size in zip(pair, (1, 4), strict=True):
        modes = [("mean", "global"), ("sum", "global"), *([("sum", "rank")] if world_size > 1 else [])]
        mine = slice(BATCH // world_size)
        for index, (reduction, normalize) in enumerate(modes):
            losses = F.cross_entropy(net(X[mine]), y[mine], reduction="none")
            settings: Any = {"reduction": reduction, "normalize": normalize}
            grad = gradient(net, cell_loss(losses, n_global=BATCH, averaged_over=world_size, **settings))
            overflow, underflow = lost_in_float16(grad, [2.0**power for power in powers])
            label = reduction if world_size == 1 else f"{reduction}, {normalize}"
            for shares, name, width in ((overflow, label, 1.8), (underflow, None, 0.8)):
                percent = [100 * share or math.nan for share in shares]
                curve(axes, index, [2.0**power for power in powers], percent, name, marked=False, linewidth=width)
            fits[reduction, normalize, world_size] = max(p for p in powers if overflow[p] == 0)
            lost[reduction, normalize, world_size] = overflow[round(math.log2(initial))]
        axes.axvline(initial, color="0.4", linewidth=1, linestyle=":")
        axes.set_xscale("log", base=2)
        legend(axes, loc="center left", bbox_to_anchor=(0, 0.62), title="infinite (thin: 0)", title_fontsize=7)
    by_mean, by_sum, start = fits["mean", "global", 1], fits["sum", "global", 1], math.log2(initial)
    require(by_mean >= start > by_sum, f"no overflow up to the powers {fits}")
    return Finding(
        f"float16 holds the mean's gradient up to a loss scale of 2^{by_mean}, the sum's up to 2^{by_sum}: fp16's "
        f"initial 2^{start:.0f} is {start - by_sum:.0f} halvings too high for it (by casts on a CPU)",
        f"The mlp's first gradient, n = {BATCH}, times the loss scale, cast to float16: the mean's has no infinite "
        f"entry up to 2^{by_mean}, the sum's up to 2^{by_sum}. At the initial 2^{start:.0f}, "
        f"{lost['sum', 'global', 1]:.2%} of the sum's entries are infinite, and one is enough: a scaler would halve, "
        f"and skip, {start - by_sum:.0f} steps. Thin lines: entries that round to 0. This is arithmetic on a CPU: no "
        "fp16 training was run on a GPU for it, where half-precision activations can overflow earlier than these "
        "entries.",
        f"Under `global` a rank back-propagates W times its share's sum, so that its gradient is as large as one "
        f"process's: no infinity up to 2^{fits['sum', 'global', 4]}. A plain loop's is W times smaller "
        f"(2^{fits['sum', 'rank', 4]}).",
    )
