"""Claims 3 and 7: what the size of a batch, and an uneven last one, do to a step."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.figure import Figure
from torch.nn import functional as F

from loop.config import Config
from loop.shards import Tail, sizes_in_words
from scripts.gallery.drawing import Finding, curve, legend, panels, plot
from scripts.gallery.probes import (
    BATCH,
    LR,
    TAIL,
    Runs,
    distance,
    effect_cells,
    effect_of_tail,
    first_examples,
    fresh,
    gradient,
    last,
    over,
    percent,
    pick,
    require,
    widest_gap,
)


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
    one.set(xscale="log", yscale="log", ylabel="length of the first gradient (nats)")
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
    several.set(ylabel="length of the step (× exact mean's)", ylim=(0, 1.15))
    legend(several, loc="lower right")
    off = max(abs(value - 1) for value in measured["global"])
    least = min(measured["rank"])
    require(change["mean"] < 4 and off < 1e-6 and abs(least - 0.25) < 0.01, f"{change}, {measured}")
    return Finding(
        "Empty ranks shorten the mean's step",
        f"From {sizes[0]} to {sizes[-1]} examples the length of the mean's gradient changes {change['mean']:.2f}-fold "
        f"(noise averages out), the sum's {change['sum']:.0f}-fold.",
        f"A mean by rank depends on the batch size again: where some ranks are empty they are averaged in, down to "
        f"{least:.3g} of the exact step at {min(n)} examples. `global` is off by {off:.1g} at most.",
    )


def weights(figure: Figure, runs: Runs) -> Finding:
    """Who counts how much in the book's last batch, from 1 to 64 ranks."""
    ranks = [2**k for k in range(7)]
    axes = plot(figure, xscale="log", xlabel="ranks, W", ylabel="weight of an example (× n)", ylim=(0, 2.1))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, list(map(str, ranks)))
    tails: tuple[Tail, ...] = ("spread", "ragged")
    for index, tail in enumerate(tails):
        effects = [effect_of_tail(world_size, tail=tail) for world_size in ranks]
        curve(axes, index, ranks, [e.heaviest for e in effects], f"{tail}: heaviest")
        curve(axes, index + 2, ranks, [e.lightest for e in effects], f"{tail}: lightest")
    legend(axes, loc="upper left")
    four, most = effect_of_tail(4), effect_of_tail(64, tail="spread")
    return Finding(
        "Ranks and dealing decide who counts",
        f"Every example of the last batch, of {TAIL}, weighs 1/n.",
        f"Each rank's mean is averaged. Dealt raggedly to 4 ranks an example weighs {four.lightest:.3g}/n to "
        f"{four.heaviest:.3g}/n; spread over 64, {most.lightest:.3g}/n to {most.heaviest:.3g}/n.",
    )


def cost(figure: Figure, runs: Runs) -> Finding:
    """What the weights of the last batch do to a trained net, over the number of training examples."""
    axes = plot(
        figure, xscale="log", yscale="log", xlabel="training examples, N",
        ylabel="trained weights off one process's (%)",
    )  # fmt: skip
    ends: dict[str, tuple[int, float, int, float]] = {}
    for index, left in enumerate((TAIL, 129)):
        plain = {int(run.config["train_examples"]): run for run in runs["size-plain"]}
        sizes = sorted(n for n in plain if n % BATCH == left)
        moved = [100 * distance(plain[n], pick(runs["size-exact"], train_examples=n)) for n in sizes]
        dealt = sizes_in_words(Config(tail="ragged").shards(sizes[0], 4).last_step.sizes)
        curve(axes, index, sizes, moved, f"4 ranks hold {dealt} in the last step")
        for n, value in zip(sizes, moved, strict=True):
            where: Any = {"xytext": (0, -13 + 19 * index), "textcoords": "offset points", "ha": "center"}
            axes.annotate(percent(value), (n, value), fontsize=8, **where)
        require(moved[0] > moved[-1], f"off by {moved} % at {sizes}")
        ends[dealt] = sizes[0], moved[0], sizes[-1], moved[-1]
    axes.set_xticks([400, 1_000, 4_000, 16_000, 60_000], ["400", "1,000", "4,000", "16,000", "60,000"])
    axes.set_yticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"])
    axes.minorticks_off()
    axes.margins(0.08, 0.15)
    legend(axes)
    found = [
        f"{dealt}: {percent(small)} off at N = {n:,}, {percent(large)} at {most:,}"
        for dealt, (n, small, most, large) in ends.items()
    ]
    return Finding(
        "What the last batch costs trained weights",
        "The reference: the distance is taken from its weights, relative to their length.",
        f"Each rank's mean is averaged, on 4 ranks whose last step is dealt raggedly. {'; '.join(found)}. That step is "
        f"one in 2 of the smallest set and one in {math.ceil(60_000 / BATCH)} of the largest.",
    )


def tail(figure: Figure, runs: Runs) -> Finding:
    """The length of each step, where every fourth batch is the book's last one."""
    pair = panels(
        figure,
        right="4 ranks, a plain loop",
        xlabel="step",
        ylabel=f"length of the step (× mean's at lr {LR})",
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
        "A plain loop shortens the short step",
        f"On the short batch ({TAIL} of {BATCH}) the mean's step is {lengths['mean', 1]:.3g} of the exact mean's, "
        f"and an example weighs {1 / share:.3g} times as much as in a full batch: the step is steady, the weights "
        f"are not. The sum's is {lengths['sum', 1]:.3g}, and every example of the epoch weighs the same.",
        f"Dealt as 64, 32, 0, 0 the mean's short step is {lengths['mean', 4]:.3g} of what it should be: there a "
        f"plain mean is no steadier than a sum. The sum's is {lengths['sum', 4]:.3g}, W times too short as all its "
        "steps are.",
    )


def overlay(figure: Figure, runs: Runs) -> Finding:
    """How far the loss of 2 and 4 ranks is from that of W = 1, at every step, under global and by rank."""
    axes = plot(figure, xlabel="step", ylabel="train loss off that of W = 1 (nats per example)")
    gaps, off, modes = {}, {}, [(normalize, w) for normalize in ("rank", "global") for w in (2, 4)]
    for index, (normalize, world_size) in enumerate(modes):
        run, alone = (pick(runs["overlay"], world_size=w, normalize=normalize) for w in (world_size, 1))
        steps, values = over(run, "step", "step/loss")
        apart = [abs(a - b) for a, b in zip(values, over(alone, "step", "step/loss")[1], strict=True)]
        curve(axes, index, steps, apart, f"W = {world_size}, {normalize}", marked=False)
        gaps[normalize, world_size], off[normalize, world_size] = max(apart), distance(run, alone)
    axes.set_yscale("symlog", linthresh=1e-16, subs=[1])
    axes.set_yticks([0, 1e-16, 1e-12, 1e-8, 1e-4, 1])
    axes.set_ylim(0, 10)
    legend(axes, loc="center right")
    exact = max(off["global", world_size] for world_size in (2, 4))
    require(exact < 1e-12 and gaps["rank", 4] > 0.01, f"gaps {gaps}, weights off by {off}")
    return Finding(
        "Only global takes one process's steps",
        f"The reference: {len(steps)} steps, every fourth on the book's {TAIL} examples.",
        f"Under `global` the final weights of 2 and 4 ranks are within {exact:.1g} (relative, float64) of one "
        f"process's and no step's loss differs by more than {max(gaps['global', 2], gaps['global', 4]):.1g}. By rank "
        f"they are {percent(100 * off['rank', 2])} and {percent(100 * off['rank', 4])} off, a step's loss by up to "
        f"{gaps['rank', 2]:.2g} and {gaps['rank', 4]:.2g}.",
    )


def accumulation(figure: Figure, runs: Runs) -> Finding:
    """The last batch's step over the micro-batches in a step: predicted, and audited."""
    pair = panels(
        figure, right="4 ranks", xlabel="micro-batches in a step, K", ylabel="length of the last step (× exact mean's)",
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
        "Accumulation shortens a short batch's step",
        f"K micro-batches are averaged, empty ones too: the last {TAIL} examples fill {effect_cells(1, 16)} of 16, and "
        f"their step is {measured[1][-1]:.3g} of the exact mean's. That is the loop of one process, without any rank: "
        f"after 3 epochs of {BATCH + TAIL} examples the train loss is {loss[1][-1]:.3f} instead of {loss[1][0]:.3f}.",
        f"Ranks and micro-batches are cells alike: 4 ranks start at {measured[4][0]:.3g} for K = 1 and end at "
        f"{measured[4][-1]:.3g} for K = {ks[-1]}, where one process ends as well. (Where cells are unequal the short "
        "one's gradient is noisier, so the step is a little longer than the examples' weights add up to.)",
    )
