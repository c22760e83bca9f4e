"""The book's three networks for 28 x 28 grey images: softmax regression, a multilayer perceptron, LeNet."""

from __future__ import annotations

from typing import Literal

from torch import nn


def make_net(name: Literal["softmax", "mlp", "lenet"], classes: int = 10) -> nn.Sequential:
    """Return a freshly initialised net: (B, 1, 28, 28) to logits (B, classes). Draws from torch's global generator.

    softmax (d2l 3.7) and mlp (4.3) start from weights of N(0, 0.01^2); lenet (6.6) from Xavier's uniform.
    """
    if name == "softmax":
        net = nn.Sequential(nn.Flatten(), nn.Linear(784, classes))
    elif name == "mlp":
        net = nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, classes))
    else:
        net = nn.Sequential(
            nn.Conv2d(1, 6, kernel_size=5, padding=2), nn.Sigmoid(), nn.AvgPool2d(2),
            nn.Conv2d(6, 16, kernel_size=5), nn.Sigmoid(), nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * 5 * 5, 120), nn.Sigmoid(),
            nn.Linear(120, 84), nn.Sigmoid(),
            nn.Linear(84, classes),
        )  # fmt: skip
    for layer in net:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            if name == "lenet":
                nn.init.xavier_uniform_(layer.weight)
            else:
                nn.init.normal_(layer.weight, std=0.01)
    return net
