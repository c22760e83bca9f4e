"""Lightning, with `accumulate_grad_batches`.

    torchrun --standalone --nproc_per_node 2 -m scripts.recipes.lightning [--plain]

Lightning divides a loss by K and DDP by W. So the loss is a sum in place of a mean, and a hook multiplies the gradient
by W K over the number of examples in the whole step, just before it is clipped and applied.

Not covered: manual optimisation, several optimisers, and fp16, under which a sum overflows sooner than a mean.
"""

import sys
from itertools import chain

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from loop.reduction import global_count
from loop.run.launch import launched_world_size
from scripts.recipes import LR, Batch, Batches, make_net, recipe


class Module(LightningModule):  # type: ignore[misc, unused-ignore]
    def __init__(self, net: nn.Module, right: bool) -> None:
        super().__init__()
        self.net, self.right, self.n_local = net, right, 0

    def training_step(self, batch: Batch, _: int) -> Tensor:
        self.n_local += len(batch[1])
        return F.cross_entropy(self.net(batch[0]), batch[1], reduction="sum" if self.right else "mean")

    def on_before_optimizer_step(self, _: torch.optim.Optimizer) -> None:
        n, self.n_local = global_count(self.n_local, self.device), 0
        for grad in (param.grad for param in self.parameters() if self.right and param.grad is not None):
            grad *= self.trainer.world_size * self.trainer.accumulate_grad_batches / n

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=LR)


def train(batches: Batches, *, right: bool = True) -> nn.Module:
    module = Module(make_net(batches), right)
    Trainer(
        accelerator="cpu", devices=launched_world_size(), strategy="ddp", use_distributed_sampler=False, max_epochs=1,
        accumulate_grad_batches=len(next(iter(batches))), barebones=True,
    ).fit(module, DataLoader([*chain(*batches)], batch_size=None))  # type: ignore[arg-type] # fmt: skip
    return module.net


def plain(batches: Batches) -> nn.Module:
    return train(batches, right=False)


main = recipe(train, plain)

if __name__ == "__main__":
    sys.exit(main())
