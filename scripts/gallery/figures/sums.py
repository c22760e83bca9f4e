"""Claims 5 and 6: what is reported, and what the book's updater divides by."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch.nn import functional as F

from scripts.gallery.drawing import Finding, curve, legend, panels
from scripts.gallery.probes import (
    BATCH,
    TAIL,
    Runs,
    data,
    first_examples,
    last,
    net_of,
    over,
    percent,
    pick,
    reported_losses,
    require,
    widest_gap,
)


def metrics(figure: Figure, runs: Runs) -> Finding:
    """How wrong a reported loss is: sums over examples against means of means, over data sets that end on 96."""
    one, several = panels(
        figure, right="averaged over the ranks' averages", xscale="log", yscale="log", xlabel="training examples, N",
        ylabel="reported loss off (share)",
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
        "Add up sums; do not average averages",
        f"Added up as float(l) x len(y), the loss is off by {max(exact):.1g} at most, one float32 rounding a batch. A "
        f"mean of the batches' means is off by up to {percent(100 * max(batches))} at N = {sizes[0]} and "
        f"{percent(100 * batches[-1])} at {sizes[-1]}.",
        f"Each rank's own loss is right for that rank, and their average is wrong for the job: by up to "
        f"{percent(100 * max(off['4 ranks']))} at N = {sizes[0]} on 4 ranks, {percent(100 * off['4 ranks'][-1])} at "
        f"{sizes[-1]}. Here the sums are reduced, not the means.",
    )


def drift(figure: Figure, runs: Runs) -> Finding:
    """The book's updater: the torch optimiser's twin in one process; on several ranks its replicas part."""
    one, several = panels(figure, right="between replicas", xlabel="step")
    torch_mean, scratch = (pick(runs[study], world_size=1) for study in ("drift-torch", "drift"))
    steps, wanted = over(torch_mean, "step", "step/loss")
    values = over(scratch, "step", "step/loss")[1]
    one.plot(steps, wanted, color="0.7", linewidth=5, label="torch.optim, mean")
    curve(one, 1, steps, values, "the book's sgd, sum", marked=False)
    one.set_ylabel("train loss (nats per example)")
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
    return Finding(
        "The book's updater lets replicas diverge",
        "Handed the batch size, the book's `sgd` on a summed loss takes `torch.optim.SGD`'s steps on the mean: no "
        f"loss differs by more than {gap:.1g}, the short batches included.",
        f"Each rank divides by its own share: on 4 ranks the replicas part further at {len(jumps)} of {len(steps)} "
        "steps, the epochs' short last ones, and keep their distance in between (3 ranks cannot divide the batch "
        f"evenly, and divide by different numbers at every step); nothing is said. After {steps[-1]:.0f} steps a "
        f"parameter differs by {apart[2][-1]:.2g}, {apart[3][-1]:.2g}, {apart[4][-1]:.2g} on 2, 3, 4 ranks; "
        f"{max(together):g} under `global`. On all 60000 examples, 3 epochs, 4 ranks it is {book:.2g}: one step in "
        "235.",
    )
