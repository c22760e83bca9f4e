"""Show what an epoch's last step does on W ranks, under every tail and mode: by arithmetic, without torch.

    python -m scripts.explain --examples 60000 --batch-size 256 --world-size 8
    python -m scripts.explain --examples 1000 --batch-size 64 --world-size 3 --accumulate 2 --png cells.png
    python -m scripts.explain --examples 897 --world-size 4 --html explain.html

It prints how each tail deals the step to the ranks, and what each mode makes an example weigh. The page of --html shows
the same with sliders; it is one file that opens from disk, and its address keeps the settings.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from loop.config import Config, InputError
from loop.effect import effect, example_weights
from loop.reduction import Normalize, Reduction
from loop.shards import Shards, Tail, sizes_in_words
from scripts.command import command

LONGEST = 60  # characters of a list of sizes
LIMITS = {"N": 1_000_000, "B": 8_192, "W": 64, "K": 16}  # of the page's sliders


def distributed_sampler(examples: int, batch_size: int, world_size: int) -> tuple[list[int], int]:
    """Return (last batch of each rank, examples seen twice) under torch's DistributedSampler with drop_last=False.

    It repeats the epoch's first examples until every rank has ceil(N / W), and each rank cuts its own into batches.
    """
    each, batch = -(-examples // world_size), max(1, batch_size // world_size)
    return [each % batch or batch] * world_size, each * world_size - examples


def of_ranks(sizes: Sequence[int], world_size: int) -> list[int]:
    """Return the examples of each rank, over its micro-batches."""
    return [sum(sizes[rank::world_size]) for rank in range(world_size)]


def abridged(sizes: Sequence[int]) -> str:
    """Return the sizes in words, cut in the middle where they are many."""
    words = sizes_in_words(sizes)
    return words if len(words) <= LONGEST else f"{words[: LONGEST // 2]} ... {words[-LONGEST // 2 :]}"


def explain(examples: int, batch_size: int, world_size: int, accumulate: int, lr: float, virtual_ranks: int = 0) -> str:
    """Return the whole explanation as text. Raises InputError for sizes below 1 and senseless learning rates."""
    if not 0 < lr < math.inf:
        raise InputError(f"--lr {lr:g} must be a finite number above 0")
    config = Config(batch_size=batch_size, accumulate=accumulate, virtual_ranks=virtual_ranks, lr=lr)
    spread = config.shards(examples, world_size)
    accumulate = spread.accumulate  # which follows from the virtual ranks, if there are any
    config = replace(config, accumulate=accumulate, virtual_ranks=0)
    lines = [
        f"{examples} examples in batches of {batch_size}: {spread.step_count} steps; the last has "
        f"{spread.last_step.n_global}. {world_size} rank(s) x {accumulate} micro-batch(es) = {spread.cells} cell(s).",
        *([shares(spread)] if virtual_ranks else []),
        "",
        f"{'last step dealt by':<20}{'twice':>7}{'never':>7}{'idle':>7}  examples of each rank",
    ]
    plans: dict[tuple[int, ...], list[str]] = {}
    for tail in get_args(Tail):
        try:
            shards = Shards(examples, batch_size, world_size, accumulate, tail)
        except ValueError as refusal:
            lines.append(f"{tail:<20}{'':>21}  refused: {refusal}")
            continue
        sizes, census = shards.last_step.sizes, shards.census
        ranks = of_ranks(sizes, world_size)
        lines.append(
            f"{tail:<20}{census.duplicated:>7}{census.missing:>7}{ranks.count(0):>7}  {abridged(ranks)}"
            + (" (a full step: the incomplete one is dropped)" if census.missing else "")
        )
        plans.setdefault(sizes, []).append(tail)
    ranks, twice = distributed_sampler(examples, batch_size, world_size)
    share, rest = divmod(batch_size, world_size)
    of_each = f" (in batches of {max(1, share)} a rank)" if rest else ""
    lines.append(f"{'DistributedSampler':<20}{twice:>7}{0:>7}{0:>7}  {abridged(ranks)}{of_each}")
    for sizes, tails in plans.items():
        lines += ["", *mode_table(config, sizes, tails, world_size)]
    return "\n".join([*lines, "", advice(config, plans, world_size, twice)])


def shares(plan: Shards) -> str:
    """Return how the last step is dealt to virtual ranks."""
    of_rank_0 = abridged(range(plan.cells)[:: plan.world_size])
    return (
        f"Virtual ranks: on any number of ranks the last step has {plan.cells} shares, of "
        f"{abridged(plan.last_step.sizes)} examples;\nrank 0 has the shares {of_rank_0}. Each share's gradient is "
        "taken by itself, and all are added in one fixed tree."
    )


def mode_table(config: Config, sizes: Sequence[int], tails: list[str], world_size: int) -> list[str]:
    """Return what each mode makes of a step of these sizes, a line a mode."""
    lines = [
        f"--tail {' or '.join(tails)}: n = {sum(sizes)}, cells of {abridged(sizes)}",
        f"  {'mode':<24}{'weight of an example':>24}{'step / mean':>13}{'effective lr':>14}  replicas",
    ]
    for mode in modes(config):
        light, heavy, length, lr_effective, drifts = effect(mode, sizes, world_size)
        weight = f"{light:.4g}/n" if light == heavy else f"{light:.4g}/n to {heavy:.4g}/n"
        name = f"{mode.reduction}, {mode.normalize}" + (", scratch" if mode.updater == "scratch" else "")
        lines.append(
            f"  {name:<24}{weight:>24}{length:>13.4g}{lr_effective:>14.4g}  {'drift apart' if drifts else 'agree'}"
        )
    return lines


def modes(config: Config) -> list[Config]:
    """Return the configuration in every mode, the scratch updater's last."""
    choices = itertools.product(get_args(Reduction), get_args(Normalize))
    torch = [replace(config, reduction=reduction, normalize=normalize) for reduction, normalize in choices]
    return torch + [replace(mode, updater="scratch") for mode in torch]


def advice(config: Config, plans: dict[tuple[int, ...], list[str]], world_size: int, twice: int) -> str:
    """Return what is right and what is wrong in a plain loop. twice: how many copies a DistributedSampler adds."""
    copies = f"but {twice} example(s) count twice" if twice else "and no example counts twice"
    text = (
        "Dealt by DistributedSampler, all ranks hold equally many examples in every step: a mean by rank is right, "
        f"{copies}. "
    )
    plain = replace(config, normalize="rank")
    off = {tails[0]: effect(plain, sizes, world_size) for sizes, tails in plans.items() if len(set(sizes)) > 1}
    if off:
        tail, worst = min(off.items(), key=lambda item: item[1].lightest)
        weight = f"{worst.lightest:.4g}/n"
        if worst.lightest != worst.heaviest:
            weight += f" to {worst.heaviest:.4g}/n"
        text += (
            f"Dealt by --tail {tail}, it gives an example {weight}, and a step {worst.length:.4g} times the mean's; "
            "--normalize global gives 1/n under every tail. "
        )
    else:
        text += "All cells are equal here, so it is right under every tail. "
    return text + f"A sum by rank is divided by the {world_size * config.accumulate} cell(s)."


def draw(examples: int, config: Config, world_size: int, path: Path) -> None:
    """Write a PNG of the last step's cells under each tail, coloured by an example's weight in a plain loop."""
    import numpy as np
    from matplotlib.figure import Figure

    rows = {}
    for tail in get_args(Tail):
        try:
            sizes = Shards(examples, config.batch_size, world_size, config.accumulate, tail).last_step.sizes
        except ValueError:
            continue
        weights = example_weights("mean", "rank", sizes)
        rows[tail] = [weight * sum(sizes) if size else math.nan for size, weight in zip(sizes, weights, strict=True)]
    figure = Figure(figsize=(8, 1 + 0.6 * len(rows)), layout="constrained")
    axes = figure.add_subplot(facecolor="lightgrey")
    image = axes.imshow(np.array(list(rows.values())), aspect="auto", cmap="viridis", interpolation="nearest")
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set(xlabel="cell, micro-batch by micro-batch, rank by rank (grey: empty)", title=(
        f"Who counts how much in the last step: mean by rank, N = {examples}, "
        f"batch {config.batch_size}, {len(next(iter(rows.values())))} cells"
    ))  # fmt: skip
    figure.colorbar(image, label="weight of an example, times n")
    figure.savefig(path, dpi=150, format="png")


def page(examples: int, batch_size: int, world_size: int, accumulate: int, lr: float) -> str:
    """Return the page with these settings, dealt as Accelerate's `even_batches=False` does until another is chosen.

    Raises InputError for sizes above those of the page's sliders.
    """
    sizes = {"N": examples, "B": batch_size, "W": world_size, "K": accumulate}
    names = {"N": "--examples", "B": "--batch-size", "W": "--world-size", "K": "--accumulate"}
    for key, size in sizes.items():
        if size > LIMITS[key]:
            raise InputError(f"{names[key]} {size}: the page of --html shows at most {LIMITS[key]}")
    settings = {**sizes, "lr": lr, "tail": "ragged", "reduction": "mean", "normalize": "rank"}
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    return template.replace("@DATA@", json.dumps({"settings": settings, "limits": LIMITS}))


@dataclass(frozen=True)
class Flags:
    """The flags."""

    examples: int = 60_000
    """Training examples, N."""
    batch_size: int = 256
    """Examples in a step over all ranks."""
    world_size: int = 8
    """Ranks, W."""
    accumulate: int = 1
    """Micro-batches in a step, K."""
    virtual_ranks: int = 0
    """Shares of a step, V, with the same bits on any number of ranks that divides V: K is then V / W. 0: off."""
    lr: float = 0.1
    """Learning rate."""
    png: Path | None = None
    """Draw the cells, coloured by weight, into this file."""
    html: Path | None = None
    """Write a page with sliders for all of this into this file."""


@command
def main(flags: Flags) -> None:
    """Print the explanation; draw it, and write the page, where asked."""
    print(explain(flags.examples, flags.batch_size, flags.world_size, flags.accumulate, flags.lr, flags.virtual_ranks))
    if flags.png:
        config = Config(batch_size=flags.batch_size, accumulate=flags.accumulate)
        try:
            draw(flags.examples, config, flags.world_size, flags.png)
        except OSError as error:
            raise InputError(str(error)) from None
        print(f"drawn into {flags.png}")
    if flags.html:
        text = page(flags.examples, flags.batch_size, flags.world_size, flags.accumulate, flags.lr)
        try:
            flags.html.write_text(text, encoding="utf-8")
        except OSError as error:
            raise InputError(str(error)) from None
        print(f"open {flags.html} in a browser")


if __name__ == "__main__":
    sys.exit(main())
