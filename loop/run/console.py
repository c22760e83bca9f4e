"""What a run prints: at its start what it will do, at its end its results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from loop.book import unmet_thresholds
from loop.config import Config
from loop.effect import applied_weights, effect, steps_by_lr
from loop.effect import divisors as divisors_of
from loop.shards import Shards, sizes_in_words


def opening(config: Config, shards: Shards, device: str, folder: Path) -> str:
    """Return what the run will do: data, device, ranks, cells, steps, tail, mode."""
    full, last = shards.steps[0], shards.last_step
    lines = [
        f"{config.net} on {config.dataset}: {shards.examples} examples, {config.epochs} x {len(shards.steps)} steps",
        f"{shards.world_size} rank(s) on {device}, {config.dtype}, mixed precision {config.mixed_precision}",
        f"a step: {full.n_global} examples in {shards.cells} cell(s): {sizes_in_words(full.sizes)}"
        + (f", {shards.accumulate} micro-batches a rank" if shards.accumulate > 1 else ""),
        f"an epoch's last step (--tail {config.tail}): {last.n_global} examples: {sizes_in_words(last.sizes)}",
        f"--reduction {config.reduction} --normalize {config.normalize}, "
        + (f"{config.optimizer}" if config.updater == "torch" else "the book's scratch sgd")
        + f", lr {config.learning_rate:g}",
        f"kept in {folder}",
    ]
    return "\n".join(lines)


def results(summary: Mapping[str, float], skipped_steps: int) -> str:
    """Return a short table of the last epoch's metrics, and whether they meet the book's thresholds."""
    lines = [f"{'epoch ' + str(summary['epoch']):<8}{'loss':>10}{'accuracy':>10}"]
    lines += [f"{half:<8}{summary[half + '/loss']:>10.4f}{summary[half + '/acc']:>10.4f}" for half in ("train", "test")]
    unmet = unmet_thresholds(summary["train/loss"], summary["train/acc"], summary["test/acc"])
    lines += [f"the book's thresholds: {'not met: ' + ', '.join(unmet) if unmet else 'met'}"]
    lines += [f"{summary['time/examples_per_s']:,.0f} examples/s in the last epoch"]
    if skipped_steps:
        lines += [f"{skipped_steps} of {summary['step']} steps skipped: their fp16 gradients overflowed"]
    return "\n".join(lines)


def last_batch(config: Config, shards: Shards) -> str:
    """Return one plain sentence on what the all-reduce did to the epoch's last batch."""
    sizes, ranks = shards.last_step.sizes, shards.world_size
    n, census = sum(sizes), shards.census
    weights, divisors = applied_weights(config, sizes, ranks), divisors_of(config, sizes, ranks)
    cells = [(size, weight * n) for size, weight in zip(sizes, weights, strict=True) if size]
    (smallest, light), (largest, heavy) = min(cells), max(cells)

    joined = "added" if config.virtual_ranks else "averaged"
    dealt = (
        f"in {shards.cells} cells ({sizes_in_words(sizes)}), which were {joined}" if shards.cells > 1 else "in one cell"
    )
    weighed = f"an example weighed {light:.4g}/n"
    if light != heavy:
        weighed += f" in the smallest cell ({smallest}) and {heavy:.4g}/n in the largest ({largest})"
    elif shards.cells > 1:
        weighed += " in every cell"
    text = f"An epoch's last step took {n} example(s) {dealt}: {weighed}"
    if steps_by_lr(config):
        lr = effect(config, sizes, ranks).lr_effective
        text += f", effective learning rate {lr:.4g} (--lr {config.learning_rate:g})"
    if len(set(divisors)) > 1:
        text += f"; so on rank 0, but the ranks divided by {sizes_in_words(divisors)}, and drifted apart"
    if census.duplicated:
        text += f"; {census.duplicated} of the examples had been seen before"
    if census.missing:
        text += f"; {census.missing} examples of the epoch were never seen"
    return text + "."


def worst_audit(config: Config, step: int, error: float) -> str:
    """Return in one line which audited step's gradient was furthest off, by how much, and which flags cause that."""
    rounding = 2e-2 if config.mixed_precision != "no" else 1e-12 if config.dtype == "float64" else 1e-5
    if error <= rounding:
        cause = "only rounding is left"
    elif config.normalize == "rank":
        mode = f"--normalize rank --reduction {config.reduction} --updater {config.updater}"
        cause = f"caused by {mode} with --tail {config.tail}"
    else:
        cause = "more than rounding, which no flag explains"
    return f"worst audited step: {step}, where the gradient is {error:.3g} (relative) off one process's: {cause}"
