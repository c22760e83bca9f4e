"""Two values of the same figure, logged on different numbers of ranks: is their quotient a known one?

    python -m scripts.diagnose --loss 4.436 0.5536 --ranks 8 1
    # 8.01 = W: a sum over ranks was logged where a mean was meant
    python -m scripts.diagnose --loss 27.3 6.83 --accumulate 4 1
    # 4.00 = K: a sum over micro-batches was logged where a mean was meant

The names are those of loop/parity.py, which finds more from the training itself.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from loop.config import InputError
from loop.parity import known_factors
from scripts.command import command

NEAR = 0.01  # figures are logged with three or four digits
MEANT = {
    "W": "a sum over ranks was logged where a mean was meant",
    "1/W": "a mean over ranks was divided by W once more",
    "K": "a sum over micro-batches was logged where a mean was meant",
    "1/K": "a mean over micro-batches was divided by K once more",
    "W K": "a sum over ranks and micro-batches was logged where a mean was meant",
    "1/(W K)": "a mean over ranks and micro-batches was divided by W and by K once more",
}
OTHERWISE = (
    "first make sure that the global batch and the learning rate are the same, and that both figures are taken over "
    "all ranks' examples; python -m loop.parity then compares the training itself"
)


@dataclass(frozen=True)
class Flags:
    """The flags."""

    loss: tuple[float, float]
    """The two values."""
    ranks: tuple[int, int] = (1, 1)
    """The ranks on which each was logged: W is their quotient."""
    accumulate: tuple[int, int] = (1, 1)
    """The micro-batches a step of each: K is their quotient."""


@command
def main(flags: Flags) -> int:
    """Print what the quotient is; return 1 where it is none that is known."""
    for name, (first, second) in {"ranks": flags.ranks, "accumulate": flags.accumulate}.items():
        if min(first, second) < 1:
            raise InputError(f"--{name} {first} {second}: must be at least 1")
    if flags.loss[1] == 0:
        raise InputError("--loss: the second value is 0, and has no quotient")
    quotient = flags.loss[0] / flags.loss[1]
    if abs(quotient - 1) < NEAR:
        print(f"{quotient:.3g}: the same, to {NEAR:.0%}")
        return 0
    factors = known_factors(flags.ranks[0] / flags.ranks[1], flags.accumulate[0] / flags.accumulate[1])
    fitting = [name for name, factor in factors.items() if abs(quotient - factor) < NEAR * factor]
    for name in fitting:
        print(f"{quotient:.3g} = {name}: {MEANT[name]}")
    if not fitting:
        print(f"{quotient:.3g} is no product of W and K, or one over it: {OTHERWISE}")
    return int(not fitting)


if __name__ == "__main__":
    sys.exit(main())
