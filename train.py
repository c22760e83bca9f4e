"""Train a net on Fashion-MNIST on any number of ranks, with the weights of one process.

    python train.py                                                   one process: a CPU, or a GPU
    scripts/train.sh --reduction mean                                 all GPUs, or 2 CPU ranks; installs what is missing
    accelerate launch train.py --reduction mean                       as your `accelerate config` says
    accelerate launch --multi_gpu --num_processes 4 train.py          4 ranks, on GPUs or on CPUs
    torchrun --nproc_per_node 4 train.py --net lenet                  the same, with another net
    scripts/cluster/multinode.sh, scripts/cluster/slurm.sbatch                        several machines
    python train.py --resume auto                                     goes on after whatever ended it
    python train.py --help                                            every flag

To see what goes wrong without `--normalize global`:

    torchrun --nproc_per_node 3 train.py --normalize rank --tail ragged --train-examples 1000
"""

from __future__ import annotations

import sys
import time
from typing import Any

from loop.config import Config, InputError, parse
from loop.run.fetch import ensure_dataset
from loop.run.launch import check_launch, count_gpus, launched_world_size, reports_errors
from loop.run.resume import is_finished, with_kept_flags
from loop.run.run import Run
from loop.run.streams import forgive_streams


def main() -> None:
    """Read the command line, check it, train."""
    forgive_streams()
    reporting = reports_errors()
    try:
        check_launch(sys.argv[1:])
        config = parse(quiet=not reporting)
        config = with_kept_flags(config, sys.argv[1:], launched_world_size())
        config.validate()
        size = ensure_dataset(config, fetching=reporting)
        shards = config.shards(size.examples, launched_world_size())
        if is_finished(config, size, shards.world_size, quiet=not reporting):
            if reporting:
                print(f"train.py: {config.folder(shards.world_size)} is finished")
            sys.exit()
        if not config.check:
            sys.exit(train(config))  # the process group is destroyed when the process exits
        check(config)
        if reporting:
            print(f"train.py: flags and data are good for {shards.world_size} rank(s)")
    except (InputError, SystemExit) as end:  # SystemExit: of flags that cannot be parsed, too
        code = 2 if isinstance(end, InputError) else end.code
        if reporting and isinstance(end, InputError):
            print(f"train.py: error: {end}", file=sys.stderr)
        elif code and not reporting:
            time.sleep(1)  # a launcher ends the other ranks as soon as one has failed: not before the error is printed
        sys.exit(code)


def check(config: Config) -> None:
    """Check what needs torch imported or a server asked, where the flags call for it."""
    if config.mixed_precision == "fp16":
        count_gpus(config)
    if config.wandb == "online":
        from loop.run.wandb_tracker import choose_mode

        choose_mode(config)


def train(config: Config) -> int:
    """Join the ranks, train as the flags say, leave the run's folder behind; return the exit code.

    May be called again in the same process, whose group of ranks it leaves standing.
    """
    with Run(config) as run:
        fit(config, run)
    return run.exit_code


def fit(config: Config, run: Run) -> None:
    """Train: the book's loop, with the net, the data and the updater of this rank."""
    import torch
    from torch import nn

    from loop.book import train_ch3
    from loop.data import EvalBatches, TrainBatches, load
    from loop.nets import make_net
    from loop.run.checkpoints import Checkpoints
    from loop.run.recorder import Recorder
    from loop.updater import Audited, make_updater

    train_set, test_set = load(config, run.device)
    run.open(train_set.size, train_set.remarks)

    torch.manual_seed(config.seed)
    net = run.prepare(make_net(config.net, train_set.size.classes))
    loss = nn.CrossEntropyLoss(reduction="none")
    updater: Any = make_updater(run.accelerator, net, config, run.progress)
    if config.audit_every:
        updater = Audited(updater, loss)

    checkpoints = Checkpoints(run, updater, run.progress)
    checkpoints.resume()
    recorder = Recorder(run, updater, run.progress)
    train_ch3(
        net,
        TrainBatches(train_set, run.shards, run.rank, config.seed, run.progress),
        EvalBatches(test_set, run.rank, run.world_size, virtual_ranks=config.virtual_ranks),
        loss,
        config.epochs,
        updater,
        progress=run.progress,
        observers=(recorder, checkpoints),
    )
    run.keep(net, recorder.close())


if __name__ == "__main__":
    main()
