"""Who counts in the last batch: what loaders and losses make of it on 4 ranks. Arithmetic; no run is trained for it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

from accelerate.data_loader import BatchSamplerShard
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from torch.utils.data import BatchSampler, Dataset, DistributedSampler

from loop.effect import example_weights
from loop.reduction import Normalize
from loop.shards import Shards
from scripts.gallery.drawing import Finding
from scripts.gallery.probes import Runs, require

N, W, SHARE = 897, 4, 64
PLAN = Shards(N, W * SHARE, W, tail="ragged")
LEFT, START = PLAN.tail_examples, PLAN.last_step.start  # examples left for the last step, and where it starts
TOKENS = (100, 50, 40, 10)  # with a label, on each rank
SLOT, GAP, EDGE = 64, 6, -112  # of the picture: a rank's slot, what is between two, the left edge


class Share(NamedTuple):
    """A rank's part of the last step: new examples, copies of earlier ones; weight: of each, times n; None: no step."""

    new: int
    copies: int
    weight: float | None


class Row(NamedTuple):
    """A row of the picture. verdict: what comes of it, in a few words."""

    name: str
    verdict: str
    shares: list[Share]


def weighed(parts: Sequence[tuple[int, int]], n: int, normalize: Normalize = "rank") -> list[Share]:
    """Return the shares of parts (new, copies) in a step of the mean loss. n: a weight of 1/n is one process's."""
    weights = example_weights("mean", normalize, [new + copies for new, copies in parts])
    return [Share(*part, weight * n) for part, weight in zip(parts, weights, strict=True)]


def last_parts(loaders: Iterable[Iterable[Sequence[int]]]) -> list[tuple[int, int]]:
    """Return (new, copies) in each rank's batch of the last step; an example before START is a copy."""
    parts = []
    for loader in loaders:
        batch = dict(enumerate(loader)).get(PLAN.step_count - 1, [])
        copies = sum(example < START for example in batch)
        parts.append((len(batch) - copies, copies))
    return parts


def by_sampler() -> list[tuple[int, int]]:
    """Return what torch's DistributedSampler deals in the last step."""
    data = cast("Dataset[int]", range(N))
    return last_parts(
        BatchSampler(DistributedSampler[int](data, W, rank, shuffle=False), SHARE, drop_last=False) for rank in range(W)
    )


def by_accelerate(even: bool) -> list[tuple[int, int]]:
    """Return what Accelerate deals in the last step, with `even_batches` or without."""
    batches = BatchSampler(range(N), SHARE, drop_last=False)
    return last_parts(BatchSamplerShard(batches, W, rank, even_batches=even) for rank in range(W))


def of_examples() -> list[Row]:
    """Return a row for each way of dealing and reducing the last examples."""
    uneven = by_accelerate(even=False)
    require([new for new, _ in uneven] == list(PLAN.last_step.sizes), f"Accelerate deals {uneven}, not raggedly")
    sampler, even, joined = (weighed(parts, LEFT) for parts in (by_sampler(), by_accelerate(even=True), uneven))
    ended = uneven.index((0, 0))
    return [
        Row("One process", "as it should be", weighed([(LEFT, 0)], LEFT)),
        Row("DistributedSampler", f"{copied(sampler)} count twice", sampler),
        Row("Accelerate's default", f"{copied(even)} count twice", even),
        Row("even_batches=False", f"hangs: rank {ended}\nhas no batch", [Share(*part, None) for part in uneven]),
        Row("the same inside Join", f"one counts {heaviest(joined):.0f} times", joined),
        Row("sum of losses × W / n", "exact", weighed(uneven, LEFT, "global")),
    ]


def of_tokens() -> list[Row]:
    """Return a row for each way of reducing the losses of ranks with different numbers of labelled tokens."""
    parts, n = [(count, 0) for count in TOKENS], sum(TOKENS)
    own = weighed(parts, n)
    return [
        Row("each rank's own mean", f"one token in {n // TOKENS[-1]}\ncounts {heaviest(own):g} times", own),
        Row("sum of losses × W / n", "exact", weighed(parts, n, "global")),
    ]


def copied(shares: Sequence[Share]) -> int:
    """Return how many examples of a step are copies."""
    return sum(share.copies for share in shares)


def heaviest(shares: Sequence[Share]) -> float:
    """Return the largest weight of an example."""
    return max(share.weight or 0 for share in shares if share.new)


def number(share: Share) -> str:
    """Return a share's weight as its box has it."""
    assert share.weight is not None
    return f"{share.weight:.2f}" if share.weight < 9.995 else f"{share.weight:.0f}"


def hero(figure: Figure, runs: Runs) -> Finding:
    """Draw a row for each loader, a box for each rank, and below it the same for tokens."""
    examples, tokens = of_examples(), of_tokens()
    exact = [share.weight for row in (examples[0], examples[-1], tokens[-1]) for share in row.shares if share.new]
    require(all(math.isclose(weight or 0, 1, rel_tol=1e-12) for weight in exact), f"weights of {exact}, not 1")
    figure.set_size_inches(8, 6.4)
    axes = figure.subplots()
    axes.set(xlim=(EDGE, 376), ylim=(9.55, -1.15))
    axes.set_axis_off()
    dealt = f"{N} examples, {W} ranks, {SHARE} per rank and step: {LEFT} are left for the last step"
    masked = f"{sum(TOKENS)} tokens with a label, unequally many on each rank, as masks leave them"
    for y, text in ((-0.85, dealt), (6.15, masked)):
        say(axes, EDGE, y, text, size=11)
    for rank in range(W):
        say(axes, left(rank) + SLOT / 2, 0.62, f"rank {rank}", ha="center", color="0.3")
    for y, row in zip((0, 1.25, 2.25, 3.25, 4.25, 5.25), examples, strict=True):
        draw(axes, y, row, 1)
    for y, row in zip((6.9, 7.9), tokens, strict=True):
        draw(axes, y, row, SLOT / max(TOKENS))
    key(axes, 9.05)
    sampler, even, joined, own = (row.shares for row in (*examples[1:3], examples[4], tokens[0]))
    return Finding(
        "Who counts in the last batch?",
        f"All {LEFT} examples weigh 1/n, n = {LEFT}: a weight × n of 1. Box: a rank; its width: its examples.",
        f"`DistributedSampler` adds {copied(sampler)} copies of earlier examples. Accelerate's default adds "
        f"{copied(even)}, so that the examples that are left weigh {number(even[0])}/n. Without `even_batches` the "
        "ranks take different numbers of steps, and the all-reduce waits for ever. Inside `Join`, which still divides "
        f"by W, the {joined[0].new} examples of a full rank weigh {number(joined[0])}/n each, and the one on rank 2 "
        f"weighs {number(joined[2])}/n. Each rank's sum times W / n gives all of them 1/n. Of {sum(TOKENS)} tokens, "
        f"{', '.join(f'{share.new} weigh {number(share)}/n' for share in own)} under each rank's own mean, and all 1/n "
        "under the global count.",
    )


def left(rank: int) -> float:
    """Return where a rank's slot begins."""
    return rank * (SLOT + GAP)


def say(axes: Axes, x: float, y: float, text: str, size: float = 10, **how: Any) -> None:
    """Write on the picture, legibly on hatches too."""
    axes.text(x, y, text, fontsize=size, va="center", path_effects=[withStroke(linewidth=3, foreground="white")], **how)


def box(axes: Axes, x: float, y: float, width: float, weight: float | None, hatch: str = "") -> None:
    """Draw a box in its weight's colour."""
    settings: Any = {"facecolor": colour(weight), "edgecolor": "0.25", "hatch": hatch, "linewidth": 0.8}
    axes.add_patch(Rectangle((x, y - 0.4), width, 0.8, **settings))


def colour(weight: float | None) -> Any:
    """Return a weight's colour: white for 1, bluer down to a quarter, redder up to 4; grey where there is no step."""
    return "0.85" if weight is None else colormaps["RdBu_r"](0.5 + 0.2 * max(-2.0, min(2.0, math.log2(weight))))


def draw(axes: Axes, y: float, row: Row, unit: float) -> None:
    """Draw a row; unit: the width of an example."""
    say(axes, EDGE, y, row.name, weight="bold")
    say(axes, left(W) + 2, y, row.verdict)
    for rank, share in enumerate(row.shares):
        x, new, width = left(rank), share.new * unit, (share.new + share.copies) * unit
        if len(row.shares) > 1:
            outline(axes, x, y, SLOT, idle=not width)
        if not width:
            say(axes, x + SLOT / 2, y, "ended" if share.weight is None else "idle", ha="center", color="0.3")
            continue
        box(axes, x, y, new, share.weight)
        if share.copies:
            box(axes, x + new, y, width - new, share.weight, "////")
        narrow = width < SLOT / 3
        where: Any = {"x": x + width + 7, "ha": "left"} if narrow else {"x": x + width / 2, "ha": "center"}
        if narrow and (share.weight or 0) > 2:
            where["bbox"] = {"facecolor": colour(share.weight), "edgecolor": "0.25", "linewidth": 0.8, "pad": 2}
        say(axes, y=y - 0.16, text="waits" if share.weight is None else number(share), weight="bold", **where)
        where.pop("bbox", None)
        count = f"{share.new} + {share.copies}" if share.copies else f"{share.new}"
        say(axes, y=y + 0.21, text=count, size=8, **where)


def outline(axes: Axes, x: float, y: float, width: float, idle: bool) -> None:
    """Draw the outline of a rank's slot, dashed where it has no examples."""
    how: Any = {"linestyle": "--", "edgecolor": "0.2"} if idle else {"edgecolor": "0.75"}
    axes.add_patch(Rectangle((x, y - 0.4), width, 0.8, fill=False, linewidth=0.8, **how))


def key(axes: Axes, y: float) -> None:
    """Explain colours, hatches and outlines."""
    say(axes, EDGE, y, "weight of an example × n:", size=9)
    for index, weight in enumerate((0.25, 0.5, 1, 2, 4)):
        box(axes, left(0) + 26 * index, y, 24, weight)
        say(axes, left(0) + 26 * index + 12, y, f"{weight:g}", size=9, ha="center")
    box(axes, 146, y, 24, 1, "////")
    say(axes, 174, y, "copies", size=9)
    outline(axes, 212, y, 24, idle=True)
    say(axes, 240, y, "no examples", size=9)
    say(axes, 300, y, "width: examples", size=9)
