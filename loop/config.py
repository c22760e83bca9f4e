"""Every option of `train.py`, defined once: the command line, the checks and `config.json` all come from here.

Imports no torch, so that `--help` and `--check` answer at once.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import tyro

from loop.reduction import Normalize, Reduction
from loop.shards import Shards, Tail

DEFAULT_SGD_LR = {"softmax": 0.1, "mlp": 0.1, "lenet": 0.9}  # the book's
DEFAULT_ADAM_LR = 1e-3
FLOAT32 = 1e38  # roughly the largest float32
FASHION_MNIST = "fashion-mnist"


WANDB_MODES = ("", "online", "offline", "disabled", "dryrun", "run", "shared")
MixedPrecision = Literal["no", "bf16", "fp16"]


class InputError(ValueError):
    """Something the user can correct: a flag, a file. Ends the program with its text alone, no traceback."""


def wandb_mode() -> str:
    """Return WANDB_MODE in lower case; "" where it is not set."""
    return os.environ.get("WANDB_MODE", "").lower()


def launched_precision() -> MixedPrecision:
    """Return the mixed precision that `accelerate launch` was told to use; "no" without a launcher, or one of these."""
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower()
    return next((precision for precision in get_args(MixedPrecision) if precision == told), "no")


@dataclass(frozen=True)
class Config:
    """The training loop of Dive into Deep Learning, chapter 3: any number of ranks takes the steps of one process."""

    reduction: Reduction = "mean"
    """Back-propagate the mean or the sum of the losses of a step."""
    normalize: Normalize = "global"
    """global: the step of one process, on any number of ranks. rank: what a plain loop does, for comparison."""
    tail: Tail = "spread"
    """How an epoch's last, incomplete batch is dealt to the ranks."""
    updater: Literal["torch", "scratch"] = "torch"
    """torch.optim, or the book's sgd(params, lr, batch_size)."""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """Which torch.optim (with --updater torch)."""
    lr: float | None = None
    """Learning rate. Default: sgd 0.1 (softmax, mlp) or 0.9 (lenet); adam and adamw 0.001."""
    momentum: float = 0.0
    """Momentum (sgd of --updater torch)."""
    weight_decay: float = 0.0
    """Weight decay (--updater torch)."""
    clip_norm: float | None = None
    """Clip the step's gradient to this norm, after the all-reduce (--updater torch)."""
    batch_size: int = 256
    """Examples in an optimiser step over ALL ranks and micro-batches."""
    accumulate: int = 1
    """Micro-batches in an optimiser step, K."""
    virtual_ranks: int = 0
    """V: give the same bits on any number of ranks that divides V; each takes V / ranks micro-batches. 0: off."""
    epochs: int = 10
    """Passes over the training set."""
    net: Literal["softmax", "mlp", "lenet"] = "softmax"
    """Softmax regression, a multilayer perceptron, or LeNet: the book's three."""
    dataset: str = FASHION_MNIST
    """fashion-mnist, or a folder that has the four idx files of an MNIST-like set in it or below it, plain or .gz."""
    data_dir: Path = Path("data")
    """Where Fashion-MNIST is kept."""
    train_examples: int | None = None
    """Train on the first N examples only, which makes any tail possible. Default: all."""
    seed: int = 0
    """Seed of the initial weights and of the order of examples."""
    dtype: Literal["float32", "float64"] = "float32"
    """Precision of weights and arithmetic."""
    mixed_precision: MixedPrecision = field(default_factory=launched_precision)
    """Autocast the forward pass (fp16 needs a GPU). Default: as `accelerate launch` was told, or no."""
    tf32: bool = False
    """Let float32 products be taken in TF32, on GPUs that have it: faster, with a relative error of about 1e-3."""
    cpu: bool = False
    """Train on the CPU even where there is a GPU."""
    out: Path = Path("runs")
    """Where runs are kept: a run lives in OUT/RUN_NAME."""
    run_name: str | None = None
    """Name of the run; must be new. Default: made from the mode, such as mean-global-spread-w2-b256."""
    group: str | None = None
    """The study that this run belongs to."""
    tags: tuple[str, ...] = ()
    """Words to find this run by."""
    notes: str | None = None
    """A remark to keep with the run."""
    log_every: int = 50
    """Steps between step rows in metrics.jsonl."""
    audit_every: int = 0
    """Steps between gradient audits; every uneven step is audited too. 0: none."""
    audit_fail: float | None = None
    """End the run where an audited gradient's relative error, or the replicas' drift, is above this."""
    checkpoint_every: int = 0
    """Steps between checkpoints, beside the one at the end of each epoch."""
    resume: str = "never"
    """never, or auto: go on from this run's newest good checkpoint, or start. Or a path: a new run that goes on from
    that checkpoint, or that run's newest."""
    ddp_timeout: float = 120
    """Seconds to wait for a silent rank before the run fails."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases. auto: as WANDB_MODE says, else online if logged in and the server answers, else offline."""
    wandb_project: str | None = None
    """Project in Weights & Biases. Default: WANDB_PROJECT, or chapter3-data-parallel."""
    wandb_entity: str | None = None
    """User or team in Weights & Biases. Default: yours."""
    check: bool = False
    """Validate everything that one process can validate, fetch the data if need be, then exit."""

    @property
    def learning_rate(self) -> float:
        """The learning rate in force: --lr, or the default of the optimiser and the net."""
        if self.lr is not None:
            return self.lr
        return DEFAULT_SGD_LR[self.net] if self.optimizer == "sgd" else DEFAULT_ADAM_LR

    def logs(self, step: int) -> bool:
        """Whether a step, counted from 1, gets a row for --log-every."""
        return step % self.log_every == 0

    def audits(self, step: int, sizes: Sequence[int]) -> bool:
        """Whether a step, dealt in these sizes, is audited: every --audit-every steps, and wherever sizes differ."""
        return self.audit_every > 0 and (step % self.audit_every == 0 or len(set(sizes)) > 1)

    def saves(self, step: int) -> bool:
        """Whether a step, counted from 1, is followed by a checkpoint, beside those at the epochs' ends."""
        return self.checkpoint_every > 0 and step % self.checkpoint_every == 0

    def shards(self, examples: int, world_size: int) -> Shards:
        """Return the epoch's plan for so many training examples; raises InputError where there is none."""
        accumulate = self.accumulate
        if v := self.virtual_ranks:
            accumulate, left = divmod(v, world_size)
            divisors = ", ".join(str(w) for w in range(1, v + 1) if v % w == 0)
            _refuse(left > 0, f"--virtual-ranks {v}: {world_size} ranks do not divide {v}: start one of {divisors}")
        try:
            return Shards(examples, self.batch_size, world_size, accumulate, self.tail)
        except ValueError as error:
            raise InputError(str(error)) from None

    def training_size(self, available: int) -> int:
        """Return how many examples are trained on, of so many; raises InputError if --train-examples asks for more."""
        wanted = available if self.train_examples is None else self.train_examples
        _refuse(wanted > available, f"--train-examples {wanted}: {self.dataset} has only {available}")
        return wanted

    def folder(self, world_size: int) -> Path:
        """Return where the run is kept, if nothing of this name is there before it; under --resume auto the latest."""
        first = path = self.out / (self.run_name or self.default_run_name(world_size))
        attempt = 2
        while self.resume == "auto" and not self.run_name and (later := numbered(first, attempt)).exists():
            path, attempt = later, attempt + 1
        return path

    def default_run_name(self, world_size: int) -> str:
        """Return the run's mode in words, such as mean-global-spread-w2-b256; v8 in place of w2 with virtual ranks."""
        ranks = f"v{self.virtual_ranks}" if self.virtual_ranks else f"w{world_size}"
        return f"{self.reduction}-{self.normalize}-{self.tail}-{ranks}-b{self.batch_size}"

    def validate(self) -> None:
        """Raise InputError for the first flag, or pair of flags, that makes no sense."""
        at_least_1 = ("batch_size", "accumulate", "epochs", "log_every")
        for flag in at_least_1 if self.train_examples is None else (*at_least_1, "train_examples"):
            self._require(getattr(self, flag) >= 1, flag, "must be at least 1")
        self._require(self.accumulate <= self.batch_size, "accumulate", "must be at most --batch-size")
        in_batch = 0 <= self.virtual_ranks <= self.batch_size
        self._require(in_batch, "virtual_ranks", "must be 0 or more, and at most --batch-size")
        self._require(0 <= self.seed < 2**63, "seed", "must be from 0 to 2^63 - 1")
        self._require(0 < self.learning_rate < FLOAT32, "lr", "must be above 0 and below 1e38")
        if self.clip_norm is not None:
            self._require(0 < self.clip_norm < math.inf, "clip_norm", "must be a finite number above 0")
        self._require(0 <= self.momentum < 1, "momentum", "must be at least 0 and below 1")
        self._require(0 <= self.weight_decay < FLOAT32, "weight_decay", "must be at least 0 and below 1e38")
        self._require(self.checkpoint_every >= 0, "checkpoint_every", "must be 0 or more")
        self._require(1 <= self.ddp_timeout <= 86400, "ddp_timeout", "must be from 1 to 86400 seconds")
        self._require(self.audit_every >= 0, "audit_every", "must be 0 or more")
        if self.audit_fail is not None:
            self._require(0 <= self.audit_fail < math.inf, "audit_fail", "must be a finite number, 0 or more")
        if self.run_name is not None:
            check_run_name(self.run_name)
        known = self.resume in ("never", "auto") or _is_folder(Path(self.resume))
        _refuse(
            not known, f"--resume {self.resume} is neither never, nor auto, nor the folder of a run or a checkpoint"
        )
        self._refuse_contradictions()
        self._refuse_what_wandb_would()
        self.refuse_existing_run()

    def refuse_existing_run(self) -> None:
        """Raise InputError if --out cannot hold a run, or the run that --run-name names exists already."""
        try:
            new = self.run_name is not None and self.resume != "auto"
            taken = new and (self.out / str(self.run_name)).exists()
            there = next(path for path in (self.out, *self.out.absolute().parents) if path.exists())
        except OSError as error:
            raise InputError(f"--out {self.out}: cannot be used: {error.strerror}") from None
        _refuse(not there.is_dir(), f"--out {self.out}: {there} is not a folder")
        _refuse(not os.access(there, os.W_OK), f"--out {self.out}: {there} cannot be written to")
        _refuse(
            taken,
            f"--run-name {self.run_name}: there is such a run in {self.out} already: choose another name, "
            "or go on with it by --resume auto",
        )

    def _refuse_what_wandb_would(self) -> None:
        """Refuse what would otherwise switch W&B off when the run has begun."""
        for tag in self.tags:
            _refuse(not 1 <= len(tag) <= 64, f"--tags {tag!r}: a tag has 1 to 64 characters")
        name = "--wandb-project" if self.wandb_project else "WANDB_PROJECT"
        project = self.wandb_project or os.environ.get("WANDB_PROJECT", "")
        _refuse(
            len(project) > 128 or bool(set(project) & set("/\\#?%:")),
            f"{name} {project!r}: a project's name has at most 128 characters, and none of / \\ # ? % :",
        )
        mode = wandb_mode()
        _refuse(
            self.wandb == "auto" and mode not in WANDB_MODES,
            f"WANDB_MODE={mode}: choose one of {', '.join(WANDB_MODES[1:])}",
        )

    def _require(self, holds: bool, flag: str, rule: str) -> None:
        _refuse(not holds, f"--{flag.replace('_', '-')} {getattr(self, flag)} {rule}")

    def _refuse_contradictions(self) -> None:
        _refuse(
            self.audit_fail is not None and self.audit_every == 0,
            "--audit-fail needs --audit-every: 1 audits every step",
        )
        if self.virtual_ranks:
            _refuse(self.accumulate != 1, "--virtual-ranks sets the micro-batches itself: leave out --accumulate")
            _refuse(self.normalize == "rank", "--virtual-ranks needs --normalize global")
            _refuse(
                self.mixed_precision == "fp16",
                "--virtual-ranks takes each micro-batch's gradient by itself, without fp16's scaler: use bf16",
            )
        if self.updater == "scratch":
            _refuse(self.optimizer != "sgd", "--updater scratch is the book's sgd: leave out --optimizer")
            _refuse(self.momentum > 0, "--updater scratch has no momentum: use --updater torch")
            _refuse(self.weight_decay > 0, "--updater scratch has no weight decay: use --updater torch")
            _refuse(
                self.clip_norm is not None,
                "--clip-norm needs --updater torch: the scratch updater divides the gradient after it would be clipped",
            )
            _refuse(
                self.mixed_precision == "fp16",
                "--mixed-precision fp16 needs --updater torch: the scratch updater would apply scaled gradients",
            )
        _refuse(
            self.momentum > 0 and self.optimizer != "sgd",
            f"--momentum is for --optimizer sgd; {self.optimizer} has its own moments",
        )
        _refuse(
            self.dtype == "float64" and self.mixed_precision != "no",
            f"--dtype float64 with --mixed-precision {self.mixed_precision}: autocast leaves float64 as it is",
        )
        _refuse(self.dtype == "float64" and self.tf32, "--tf32 is for --dtype float32")
        _refuse(
            self.cpu and self.mixed_precision == "fp16",
            "--mixed-precision fp16 needs a GPU (on a CPU it would silently train in float32): use bf16, or no --cpu",
        )


def parse(args: list[str] | None = None, *, quiet: bool = False, default: Config | None = None) -> Config:
    """Return the command line as a Config. Ends the program, with exit code 2, where it cannot be parsed.

    quiet: print no usage and no error; for all ranks but one. default: what holds where no flag is given.
    """
    return tyro.cli(
        Config,
        args=args,
        prog="train.py",
        default=default or Config(),
        console_outputs=not quiet,
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def numbered(first: Path, attempt: int) -> Path:
    """Return the folder of a default name's run, of which `first` is taken: -2, -3, ..."""
    return first if attempt == 1 else first.with_name(f"{first.name}-{attempt}")


def check_run_name(name: str) -> None:
    """Raise InputError unless the name can be a folder's and W&B's."""
    plain = re.fullmatch(r"\w[\w.-]*", name, re.ASCII) is not None
    _refuse(not plain, f"--run-name {name!r} must be a plain name: letters, digits, '_', '-' and '.'")


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name that is too long
        return False


def _refuse(contradiction: bool, message: str) -> None:
    if contradiction:
        raise InputError(message)
