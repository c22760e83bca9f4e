"""Train a net on Fashion-MNIST on any number of ranks, with the weights of one process.

    python train.py                                                   one process: a CPU, or a GPU
    scripts/train.sh --reduction mean                                 all GPUs, or 2 CPU ranks; installs what is missing
    accelerate launch train.py --reduction mean                       as your `accelerate config` says
    accelerate launch --multi_gpu --num_processes 4 train.py          4 ranks, on GPUs or on CPUs
    torchrun --nproc_per_node 4 train.py --net lenet                  the same
    scripts/multinode.sh, scripts/slurm.sbatch                        several machines
    python train.py --resume auto                                     goes on after whatever ended it
    python train.py --help                                            every flag

To see what goes wrong without `--normalize global`:

    torchrun --nproc_per_node 3 train.py --normalize rank --tail ragged --train-examples 1000
"""

from __future__ import annotations

import sys
from typing import Any

from loop.config import Config, InputError, parse
from loop.fetch import provide
from loop.launch import (
    count_gpus,
    keep_freed_memory,
    launched_local_rank,
    launched_rank,
    launched_world_size,
    make_accelerator,
)
from loop.resume import beginning, how_to_go_on, is_finished
from loop.stopping import RunEnded, StopSignal


def main() -> None:
    """Read the command line, check it, train."""
    speaks = launched_local_rank() == 0
    config = parse(quiet=not speaks)
    try:
        config.validate()
        examples = config.training_size(provide(config, fetching=speaks))
        shards = config.shards(examples, launched_world_size())
        if is_finished(config, examples, shards.world_size, quiet=not speaks):
            if speaks:
                print(f"train.py: {config.folder(shards.world_size)} is finished")
            sys.exit()
        if not config.check:
            sys.exit(train(config))  # the process's end is its group's
        check(config)
        if speaks:
            print(f"train.py: flags and data are good for {shards.world_size} rank(s)")
    except InputError as error:
        if speaks:
            print(f"train.py: error: {error}", file=sys.stderr)
        sys.exit(2)


def check(config: Config) -> None:
    """Check what takes an import of torch, or a server's answer, where the flags ask for it."""
    if config.mixed_precision == "fp16":
        count_gpus(config)
    if config.wandb == "online":
        from loop.wandb_tracker import choose_mode

        choose_mode(config)


def train(config: Config) -> int:
    """Join the ranks, train as the flags say, leave the run's folder behind; return the exit code.

    May be called again in the same process, whose group of ranks it leaves standing.
    """
    with StopSignal() as stop:  # before torch, whose import takes seconds
        return _train(config, stop)


def _train(config: Config, stop: StopSignal) -> int:
    import torch
    from accelerate.utils import broadcast_object_list
    from safetensors.torch import save_file
    from torch import nn

    from loop import console
    from loop.animator import Animator
    from loop.audit import Audit
    from loop.book import CURVES, Accumulator, train_ch3
    from loop.checkpoints import Checkpoints, failing_as_os_error
    from loop.data import EvalBatches, TrainBatches, load
    from loop.folder import open_run, write_json
    from loop.heartbeat import Heartbeat, is_from_backend
    from loop.nets import make_net
    from loop.runlog import RunLog
    from loop.tracking import JsonlTracker, describe, finish
    from loop.updater import make_updater, settle_buckets
    from loop.wandb_tracker import make_tracker

    train_split, test_split = load(config)
    jsonl = JsonlTracker()
    keep_freed_memory()
    trackers = [jsonl, *(make_tracker(config, jsonl) if launched_rank() == 0 else [])]
    accelerator = make_accelerator(config, trackers)
    main, rank, world_size = accelerator.is_main_process, accelerator.process_index, accelerator.num_processes
    device, dtype = accelerator.device, getattr(torch, config.dtype)
    shards = config.shards(len(train_split.labels), world_size)
    exit_code, folder = 1, None

    def give_up(code: int) -> None:
        if main:
            print(f"train.py: stopped before a step row or a checkpoint. {how_to_go_on(folder)}", file=sys.stderr)
        finish(accelerator, code, sparing=jsonl)  # which still gets the rows that a last checkpoint counts

    stop.last_resort = give_up
    with Heartbeat(rank, world_size) as heartbeat:
        try:
            begun: list[Any] = [None, None, None]
            if main:
                jsonl.run = open_run(config, world_size)
                checkpoint = beginning(config, jsonl.run, shards.examples, world_size)
                begun = [jsonl.run.path, jsonl.run.identity, checkpoint]
            folder, identity, checkpoint = broadcast_object_list(begun)
            accelerator.init_trackers("", describe(config, shards, accelerator, identity))
            animator = None
            if main:
                print(console.opening(config, shards, device.type, folder), flush=True)
                xlim = (1, max(config.epochs, 2))
                animator = Animator("epoch", xlim=xlim, legend=CURVES, path=folder / "curves.png")

            torch.manual_seed(config.seed)
            net = accelerator.prepare(make_net(config.net).to(dtype))
            loss, metric = nn.CrossEntropyLoss(reduction="none"), Accumulator(3)
            updater = make_updater(accelerator, net, config)
            checkpoints = Checkpoints(accelerator, updater, metric, config, shards.examples, folder, identity)
            log = RunLog(
                accelerator, config, shards, net, Audit(net, loss, config.intended), checkpoints, stop, animator
            )
            updater.on_gradient = log.on_gradient
            train_iter = TrainBatches(
                train_split.to(device), shards, rank=rank, seed=config.seed, dtype=dtype, on_cell=log.on_cell
            )
            test_iter = EvalBatches(test_split.to(device), rank=rank, world_size=world_size, dtype=dtype)
            settle_buckets(net, next(iter(test_iter))[0])
            if checkpoint:
                progress = checkpoints.load(checkpoint)
                accelerator.print(f"going on from {checkpoint}: {progress.step} steps are done", flush=True)
                log.go_on(progress, jsonl.run.read() if main else [])
                train_iter.epoch, train_iter.first_step = progress.epoch - 1, progress.epoch_steps
            train_ch3(
                net, train_iter, test_iter, loss, config.epochs, updater,
                after_cell=log.after_cell, after_epoch=log.after_epoch, first_epoch=log.epoch, metric=metric,
            )  # fmt: skip
            log.close()
            if animator:
                animator.save()
                with failing_as_os_error(folder):
                    save_file(accelerator.unwrap_model(net).state_dict(), folder / "model.safetensors")
                write_json(folder / "summary.json", {**log.summary, "skipped_steps": updater.skipped_steps})
                print(console.results(log.summary, updater.skipped_steps), console.last_batch(config, shards), sep="\n")
            exit_code = 0
        except RunEnded as ended:
            exit_code = ended.exit_code
            log.close()
            if main:
                then = f" {how_to_go_on(folder)}" if ended.goes_on else ""
                print(f"train.py: {ended} after step {log.step}.{then}", file=sys.stderr)
        except OSError as error:
            if heartbeat.is_first_to_fail():
                print(f"train.py: error: the run cannot be saved: {error}. {how_to_go_on(folder)}", file=sys.stderr)
        except RuntimeError as error:
            if not is_from_backend(error):
                raise
            accused = heartbeat.accuse(error)
            if accused:
                print(f"train.py: error: {accused}. {how_to_go_on(folder)}", file=sys.stderr)
        finally:
            stop.handled.set()
            finish(accelerator, exit_code)
    return exit_code


if __name__ == "__main__":
    main()
