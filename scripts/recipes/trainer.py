"""transformers' Trainer, with gradient accumulation.

    torchrun --standalone --nproc_per_node 2 -m scripts.recipes.trainer [--plain]

The Trainer is right for models that divide their loss by `num_items_in_batch`. It counts the step's labels (but -100)
over all micro-batches and ranks, `average_tokens_across_devices` being the default, and multiplies the loss by W. The
loss of a model that does not take the number is averaged over W and K; `compute_loss_func` is the remedy.

Not covered: the Trainer's own loader, which fills up the last step with copies; the one here deals empty batches.
"""

import sys
import tempfile

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from scripts.recipes import LR, Batches, make_net, recipe


class WithLoss(nn.Sequential):
    def forward(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, ...]:
        logits: Tensor = self[0](x)
        return (logits,) if labels is None else (F.cross_entropy(logits, labels), logits)


class OnOwnBatches(Trainer):  # type: ignore[misc, unused-ignore]
    def get_train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(self.train_dataset, batch_size=None)  # type: ignore[arg-type, unused-ignore]


def mean_of_step(outputs: tuple[Tensor], labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
    return F.cross_entropy(outputs[0], labels, reduction="sum") / num_items_in_batch


def train(batches: Batches, *, right: bool = True) -> nn.Module:
    net = make_net(batches)
    cells = [{"x": x, "labels": y} for step in batches for x, y in step]
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, num_train_epochs=1, gradient_accumulation_steps=len(next(iter(batches))), learning_rate=LR,
            optim="sgd", lr_scheduler_type="constant", max_grad_norm=0, use_cpu=True, ddp_find_unused_parameters=False,
            save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        compute = mean_of_step if right else None
        OnOwnBatches(WithLoss(net), args, train_dataset=cells, compute_loss_func=compute).train()
    return net


def plain(batches: Batches) -> nn.Module:
    return train(batches, right=False)


main = recipe(train, plain)

if __name__ == "__main__":
    sys.exit(main())
