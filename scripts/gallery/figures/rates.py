"""Claims 4 and 8: the learning rate that fits a mean, and the one that fits a sum."""

from __future__ import annotations

import math

from matplotlib.figure import Figure

from loop.book import evaluate
from loop.data import EvalBatches
from scripts.gallery.drawing import Finding, curve, legend, panels
from scripts.gallery.probes import (
    BATCH,
    CLASSES,
    LR,
    Runs,
    data,
    dead_units,
    in_nats,
    last,
    net_of,
    over,
    percent,
    pick,
    require,
    shrunken,
    widest_gap,
)
from scripts.runs import Run


def training(figure: Figure, runs: Runs) -> Finding:
    """Loss and accuracy of the run that the README starts with."""
    run = pick(runs["train"])
    loss, accuracy = panels(figure, "loss", "accuracy", xlabel="epoch")
    loss.set_ylabel("loss (nats per example)")
    accuracy.set_ylabel("accuracy (share)")
    for axes, kind in ((loss, "loss"), (accuracy, "acc")):
        for index, half in enumerate(("train", "test")):
            curve(axes, index, *over(run, "epoch", f"{half}/{kind}"), half)
        legend(axes)
    return Finding(f"Softmax regression on {run.config['world_size']} ranks", "", "")


def same_lr(figure: Figure, runs: Runs) -> Finding:
    """Sum at the mean's learning rate: softmax regression and the mlp."""
    pair = panels(figure, right="2 ranks, a plain loop", xlabel="epoch", ylabel="test accuracy (share)", ylim=(0, 1))
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
        "A sum at the mean's learning rate",
        f"Softmax regression reaches a test accuracy of {accuracy[1, 'softmax', 'mean']:.3f} by mean and "
        f"{accuracy[1, 'softmax', 'sum']:.3f} by sum, whose test loss is {last(softmax, 'test/loss'):.3g}: its "
        "logits are linear in its weights, so to make those large costs loss, and does not change which is largest. "
        f"Dividing all its weights by {BATCH} leaves the accuracy at {shrunk:.4f}, to the last example, and the loss "
        f"at {shrunk_loss:.2g}. The mlp has a bend to fall over: {percent(100 * dead)} of its hidden units are 0 for "
        f"every test image, and it guesses ({accuracy[1, 'mlp', 'sum']:.2f}, where the mean has "
        f"{accuracy[1, 'mlp', 'mean']:.2f}).",
        f"A plain loop on 2 ranks makes the sum's step half as long, {BATCH // 2} times the mean's: softmax regression "
        f"ends at {accuracy[2, 'softmax', 'sum']:.3f}, the mlp at {accuracy[2, 'mlp', 'sum']:.2f}.",
    )


def divided_lr(figure: Figure, runs: Runs) -> Finding:
    """Sum at lr/n on top of the mean, where every batch is full; on 4 ranks it takes 4 times that."""
    pair = panels(figure, right="4 ranks, a plain loop", xlabel="step", ylabel="train loss (nats per example)")
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
        "The sum's learning rate: lr × W/n",
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
        figure, "over --lr", "over the effective lr", xscale="log", ylabel="test accuracy (share)", ylim=(0, 1)
    )
    left.set_xlabel("--lr")
    right.set_xlabel("effective lr")
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
        "One curve over the effective learning rate",
        f"The mlp learns best at lr {best['mean', 1]:.3g} by mean and {best['sum', 1]:.3g} by sum: n = {BATCH} apart.",
        "The mean's curve stays where it is for W = 1, 2, 4; a plain loop's sum moves right by W (best on 4 ranks: "
        f"{best['sum', 4]:.3g}). Over the effective lr, runs at the same value agree to {gap:.4f} of accuracy up to "
        f"the best one; beyond it they part by up to {max(spread.values()):.2f}: there training is chaotic, and "
        "rounding, which differs with W, decides.",
    )


def blow_up(figure: Figure, runs: Runs) -> Finding:
    """Train loss over the learning rate: faster, then gone."""
    pair = panels(
        figure, right="4 ranks, a plain loop", xscale="log", xlabel="--lr",
        ylabel="train loss, last of 2 epochs (nats per example)",
    )  # fmt: skip
    guessing, gone, best = math.log(CLASSES), {}, {}
    losses: dict[tuple[str, int], dict[float, float]] = {}
    for axes, world_size in zip(pair, (1, 4), strict=True):
        for index, reduction in enumerate(("mean", "sum")):
            of_lr = {x: last(run, "train/loss") for x, run in by_lr(runs, reduction, world_size).items()}
            curve(axes, index, list(of_lr), list(of_lr.values()), reduction)
            least = best[reduction, world_size] = min(of_lr, key=of_lr.__getitem__)
            gone[reduction, world_size] = min(x for x in of_lr if x > least and not of_lr[x] < guessing)
            losses[reduction, world_size] = of_lr
        axes.axhline(guessing, color="0.5", linewidth=1, linestyle=":")
        axes.text(1e-6, guessing * 1.01, "guessing", fontsize=7, color="0.3", va="bottom")
    legend(pair[0])
    by_sum, by_mean, at = max(
        ((losses["sum", 1][x], y, x) for x, y in losses["mean", 1].items() if x in losses["sum", 1]),
        key=lambda pair: pair[1] - pair[0],
    )
    # Only the best rates: where a training blows up, in between, depends on rounding, and so on the machine.
    ratio = best["sum", 4] / best["sum", 1]
    require(gone["sum", 1] < gone["mean", 1] and by_sum < by_mean, f"worse than guessing from lr {gone}")
    require(ratio == 4 and best["mean", 4] == best["mean", 1], f"least losses at lr {best}")
    return Finding(
        "A sum is faster, then diverges sooner",
        f"100 steps of the mlp: at lr {at:.3g} the sum's train loss is {by_sum:.3f}, the mean's {by_mean:.3f}. At lr "
        f"{gone['sum', 1]:.3g} the sum is worse than guessing (ln {CLASSES}); the mean holds out until "
        f"{gone['mean', 1]:.3g}.",
        f"On 4 ranks a plain loop's sum takes steps n/W as long: its loss is least at lr {best['sum', 4]:.3g}, "
        f"{ratio:.3g} times as high; the mean's at {best['mean', 4]:.3g}, as before. A rate tuned on 4 ranks is W "
        "times too high for one process.",
    )
