"""Beyond plain SGD: clipping, weight decay, AdamW, and fp16's loss scale."""

from __future__ import annotations

import math
from typing import Any

from accelerate.utils import GradScalerKwargs
from matplotlib.figure import Figure
from torch.nn import functional as F

from loop.reduction import cell_loss
from scripts.gallery.drawing import Finding, curve, legend, panels, plot
from scripts.gallery.probes import (
    BATCH,
    Runs,
    distance,
    first_examples,
    fresh,
    gradient,
    last,
    lost_in_float16,
    percent,
    pick,
    require,
)


def optimizers(figure: Figure, runs: Runs) -> Finding:
    """Mean against sum at the learning rate that makes them equal under SGD: what else is scale-free?"""
    names = {"sgd": "SGD", "clip": "clipping", "decay": "decay", "adamw": "AdamW"}
    off: dict[int, list[float]] = {1: [], 4: []}
    loss = {}
    for name, world_size in ((name, world_size) for name in names for world_size in off):
        mean, by_sum = (pick(runs[f"opt-{name}-{r}-w{world_size}"]) for r in ("mean", "sum"))
        off[world_size].append(100 * distance(by_sum, mean))
        loss[name, world_size] = last(mean, "train/loss"), last(by_sum, "train/loss")
    axes = plot(figure, ylabel="weights of sum off mean's (%)", ylim=(0, 110))
    axes.bar_label(axes.bar(list(names.values()), off[1], width=0.6), [percent(value) for value in off[1]], fontsize=9)
    sgd, clip, decay, adamw = off[1]
    require(sgd < 1e-2 < min(clip, decay) and adamw < 0.1 * min(clip, decay), f"off by {off} %")
    return Finding(
        "Clipping and weight decay tell sums from means",
        f"At lr/n the sum's weights are {percent(sgd)} off the mean's under SGD. Clipped to norm 0.5, the sum's "
        f"gradient, {BATCH} times as long, is cut to the same length before lr/n makes its step {BATCH} times too "
        f"short: weights {percent(clip)} off, train loss {loss['clip', 1][1]:.2f} instead of {loss['clip', 1][0]:.2f}. "
        f"Weight decay 0.1 is multiplied by lr/n, too, and all but switched off: weights {percent(decay)} off, "
        f"{loss['decay', 1][1]:.3f} instead of {loss['decay', 1][0]:.3f}. AdamW divides by the gradient's own size: "
        f"at the same lr the weights are {percent(adamw)} off, by its eps.",
        f"A plain loop's sum at 4 lr/n on 4 ranks, in the same order: {', '.join(map(percent, off[4]))}. `global` "
        "makes W irrelevant and leaves these differences between sum and mean standing: they are one process's own.",
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
                shown = [100 * share or math.nan for share in shares]
                curve(axes, index, [2.0**power for power in powers], shown, name, marked=False, linewidth=width)
            fits[reduction, normalize, world_size] = max(p for p in powers if overflow[p] == 0)
            lost[reduction, normalize, world_size] = overflow[round(math.log2(initial))]
        axes.axvline(initial, color="0.4", linewidth=1, linestyle=":")
        axes.set_xscale("log", base=2)
        legend(axes, loc="center left", bbox_to_anchor=(0, 0.62), title="infinite (thin: 0)", title_fontsize=7)
    by_mean, by_sum, start = fits["mean", "global", 1], fits["sum", "global", 1], math.log2(initial)
    require(by_mean >= start > by_sum, f"no overflow up to the powers {fits}")
    return Finding(
        "A sum's gradient overflows float16 sooner",
        f"The mlp's first gradient, n = {BATCH}, times the loss scale, cast to float16: the mean's has no infinite "
        f"entry up to 2^{by_mean}, the sum's up to 2^{by_sum}. At the initial 2^{start:.0f}, "
        f"{percent(100 * lost['sum', 'global', 1])} of the sum's entries are infinite, and one is enough: a scaler "
        f"would halve, and skip, {start - by_sum:.0f} steps. Thin lines: entries that round to 0. This is arithmetic "
        "on a CPU: no fp16 training was run on a GPU for it, where half-precision activations can overflow earlier "
        "than these entries.",
        f"Under `global` a rank back-propagates W times its share's sum, so that its gradient is as large as one "
        f"process's: no infinity up to 2^{fits['sum', 'global', 4]}. A plain loop's is W times smaller "
        f"(2^{fits['sum', 'rank', 4]}).",
    )
