"""What rounding alone does to the weights over an epoch of steps, and that virtual ranks leave nothing of it."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from torch import Tensor, nn

from loop.book import train_epoch_ch3
from loop.config import Config, parse
from loop.data import TrainBatches, load
from loop.nets import make_net
from loop.parity import Ranks
from loop.progress import make_progress
from loop.run.launch import prepare_net
from loop.updater import make_updater, settle_buckets
from scripts.gallery.drawing import Finding, curve, legend, panels
from scripts.gallery.probes import Runs, data, require

TRAINING = "--net mlp --batch-size 256 --train-examples 3040 --momentum 0.9 --epochs 3"
WAYS = {"a plain loop": "--normalize rank --tail ragged", "global": "", "--virtual-ranks 8": "--virtual-ranks 8"}


def bits(figure: Figure, runs: Runs) -> Finding:
    """The distance of the weights from one process's, step by step: a plain loop, `global`, virtual ranks."""
    data()  # fetched if need be
    pair = panels(
        figure, left="2 ranks", right="4 ranks", xlabel="step", ylabel="weights off (share of distance travelled)",
    )  # fmt: skip
    far: dict[tuple[str, int], list[float]] = {}
    for index, (name, flags) in enumerate(WAYS.items()):
        whole = weights_by_step(1, flags)
        for axes, world_size in zip(pair, (2, 4), strict=True):
            ours = weights_by_step(world_size, flags)
            off = ((ours - whole).norm(dim=1) / (whole - whole[0]).norm(dim=1)).tolist()[1:]
            far[name, world_size] = off
            curve(axes, index, range(1, len(off) + 1), off, name if any(off) else f"{name}: 0", marked=False)
    for axes in pair:
        axes.set_yscale("symlog", linthresh=1e-8, subs=[1])
        axes.set_yticks([0, 1e-8, 1e-6, 1e-4, 1e-2, 1])
        axes.set_ylim(-1e-9, 3)
        legend(axes, loc="upper left")
    last = {key: values[-1] for key, values in far.items()}
    virtual = [value for (name, _), off in far.items() if name == "--virtual-ranks 8" for value in off]
    require(max(virtual) == 0 < last["global", 2] < 1e-3 < last["a plain loop", 2], f"in the end {last}")
    return Finding(
        "Virtual ranks leave not even rounding",
        "Its weights are the reference: drawn is the distance from them over the distance that they have travelled, in "
        "float32, on 2 ranks. After "
        f"{len(virtual) // 2} steps {last['a plain loop', 2]:.1g} for a plain loop, which is wrong in the last step of "
        f"each epoch, {last['global', 2]:.1g} under `global`, by rounding, and 0 with `--virtual-ranks 8`.",
        f"{last['a plain loop', 4]:.1g}, {last['global', 4]:.1g} and 0 on 4 ranks.",
    )


def weights_by_step(world_size: int, flags: str) -> Tensor:
    """Return the weights before the training and after each step: (steps + 1, parameters), of rank 0."""
    with Ranks(world_size) as ranks:
        weights: Tensor = ranks.run(train, f"{TRAINING} {flags}", timeout=120)[0]
    return weights


class Weights:
    """An observer that keeps the weights after every step."""

    def __init__(self, net: nn.Module) -> None:
        self.net, self.kept = net, [nn.utils.parameters_to_vector(net.parameters()).detach().clone()]

    def after_cell(self, cell: object, *_: object) -> None:
        """Note the weights after a step's last cell."""
        if cell.last:  # type: ignore[attr-defined]
            self.kept.append(nn.utils.parameters_to_vector(self.net.parameters()).detach().clone())

    def after_epoch(self, _: object) -> None:
        """Do nothing."""


def train(flags: str) -> Tensor:
    """Train on this rank, without a run's folder."""
    config: Config = parse(flags.split())
    accelerator = Accelerator(cpu=True)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    torch.manual_seed(config.seed)
    net = prepare_net(accelerator, make_net(config.net))
    settle_buckets(net, torch.empty(0, 1, 28, 28))
    split, progress = load(config)[0], make_progress(config, rank, world_size)
    shards = config.shards(config.training_size(len(split.labels)), world_size)
    batches = TrainBatches(split, shards, rank, config.seed, progress)
    updater, kept = make_updater(accelerator, net, config, progress), Weights(net)
    loss = nn.CrossEntropyLoss(reduction="none")
    for _ in range(config.epochs):
        train_epoch_ch3(net, batches, loss, updater, progress.sums, [progress, kept])
        progress.after_epoch(None)
    return torch.stack(kept.kept)
