"""Claims 3 and 7: what the size of a batch, and an uneven last one, do to a step."""

from __future__ import annotations

import math

from matplotlib.figure import Figure
from torch.nn import functional as F

from loop.shards import Tail
from scripts.gallery.drawing import Finding, curve, legend, panels
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
