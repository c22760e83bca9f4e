"""A run: its ranks, its folder and trackers, its stop signal and watchdog; and how it ends.

`train.py` enters a `Run`, which knows nothing of the training itself. Every known end becomes one line on stderr and an
exit code here and nowhere else.
"""

from __future__ import annotations

import atexit
import hashlib
import math
import os
import platform
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from loop.config import Config, InputError
from loop.effect import steps_by_lr, target_reduction
from loop.run import launch
from loop.run.folder import FAILED, git_commit, installed, open_run, write_json
from loop.run.resume import command_line, how_to_go_on, prepare_resume
from loop.run.stopping import StopSignal

if TYPE_CHECKING:
    import torch
    from torch import nn

    from loop.audit import Reading
    from loop.idx import SetSize

NOT_DETERMINISTIC = "does not have a deterministic implementation"  # torch's words
SIGTERMS = 2.0**20  # of one rank: more than all ranks' SIGINTs together
PACKAGES = ("torch", "torchvision", "accelerate", "wandb", "numpy")


class RunEnded(Exception):  # noqa: N818  # an end that all ranks come to together
    """All ranks end the run here; its text is the reason."""

    exit_code = 1
    goes_on = True  # from its last checkpoint, if the run is started again


class Stopped(RunEnded):
    """All ranks agreed to stop, on a signal or because the launcher is gone."""


class NotFinite(RunEnded):
    """The loss has become infinite or NaN."""

    goes_on = False  # resuming would diverge again


class AuditFailed(RunEnded):
    """An audited step's error was larger than `--audit-fail` allows."""


class Run:
    """What keeps one training, between `with` and its end; another run may follow on the same ranks.

    share_gpus: as for `join_ranks`.
    device, rank, world_size, is_main: of this process. progress: where the run stands. exit_code: of the process.
    After `open`: size, of the set; shards, the plan of an epoch; folder, its path; resume_from, the checkpoint to go on
    from, or None.
    stopping: whether the ranks have agreed to stop. failed: whether the training itself has, on all ranks.
    saved_in_epoch_s, saved_between_epochs_s: seconds that checkpoints took since the last epoch row, within an epoch's
    training and after it.
    """

    folder: Path
    resume_from: Path | None

    def __init__(self, config: Config, *, share_gpus: bool = False) -> None:
        self.config, self.share_gpus = config, share_gpus
        self.exit_code, self.stopping, self.failed = 1, False, False
        self.saved_in_epoch_s = self.saved_between_epochs_s = 0.0

    def __enter__(self) -> Run:
        with ExitStack() as stack:
            self.stop = stack.enter_context(StopSignal())  # before torch, whose import takes seconds
            if self.config.virtual_ranks:
                stack.enter_context(launch.equal_bits())  # before torch, too
            self._join()
            stack.enter_context(self.watchdog)
            self.at_end = stack.pop_all()
        return self

    def _join(self) -> None:
        from loop.progress import make_progress
        from loop.run.wandb_tracker import make_tracker
        from loop.run.watchdog import Watchdog

        launch.keep_freed_memory()
        self.trackers = make_tracker(self.config) if launch.launched_rank() == 0 else []
        self.accelerator = launch.join_ranks(self.config, self.trackers, share_gpus=self.share_gpus)
        self.device: torch.device = self.accelerator.device
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.is_main: bool = self.accelerator.is_main_process
        unsaved = "stopped before a step row or a checkpoint" if self.is_main else None
        self.stop.last_resort = partial(self._end_alone, line=unsaved)
        self.watchdog = Watchdog(self.rank, self.world_size, self.config.ddp_timeout, self._end_as_lost)
        self.progress = make_progress(self.config, self.rank, self.world_size)

    def open(self, size: SetSize, remarks: Sequence[str] = ()) -> None:
        """Plan the epochs; make or open the run's folder, start its trackers, print what will be done.

        size: of the set that is trained on. remarks: what else to print about it.

        Raises InputError where there is no such plan, or the folder cannot be made or opened.
        """
        from accelerate.utils import broadcast_object_list

        from loop.run import console

        self.size = size
        self.shards = self.config.shards(size.examples, self.world_size)
        shared: list[Any] = [None, None]
        if self.is_main:
            self.files = open_run(self.config, self.world_size)
            self.at_end.callback(self.files.close)
            checkpoint, origin = prepare_resume(self.config, self.files, size, self.world_size)
            shared = [self.files.path, checkpoint]
        self.watchdog.advance()
        self.folder, self.resume_from = broadcast_object_list(shared)
        described = self._describe()
        if self.is_main:
            described |= {"wandb_id": self.files.run_id, "begun_from": origin}
            write_json(self.folder / "config.json", described)
            for end in (FAILED, "summary.json"):  # of a run that goes on
                (self.folder / end).unlink(missing_ok=True)
            for tracker in self.trackers:
                tracker.files = self.files
        self.accelerator.init_trackers("", described)
        self.say("\n".join([console.opening(self.config, self.shards, self.device.type, self.folder), *remarks]))

    def _describe(self) -> dict[str, Any]:
        """Return what config.json holds: every flag, what follows from them, the machine. Every rank must call."""
        import torch
        from accelerate.utils import gather_object

        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else f"{platform.machine()} CPU"
        return {
            **asdict(self.config),
            "lr": self.config.learning_rate,
            "accumulate": self.shards.accumulate,
            "train_examples": self.shards.examples,
            "classes": self.size.classes,
            "world_size": self.world_size,
            "cells": self.shards.cells,
            "steps_per_epoch": len(self.shards.steps),
            "tail_examples": self.shards.tail_examples,
            "last_step_sizes": list(self.shards.last_step.sizes),
            "devices": gather_object([name]),  # one a rank
            "threads_per_rank": torch.get_num_threads(),
            "python": platform.python_version(),
            "versions": {package: installed(package) for package in PACKAGES},
            "git_commit": git_commit(),
            "argv": sys.argv,
            "command": command_line(sys.argv[1:]),
        }

    def prepare(self, net: nn.Module) -> nn.Module:
        """Return the net on the run's device and in its dtype; with several ranks under DDP, its buckets settled."""
        import torch

        from loop.updater import settle_buckets

        net.register_forward_hook(lambda *_: self.watchdog.advance())
        dtype = getattr(torch, self.config.dtype)
        prepared = launch.prepare_net(self.accelerator, net.to(dtype))
        settle_buckets(prepared, torch.empty(0, 1, 28, 28, dtype=dtype, device=self.device))
        return prepared

    def say(self, text: str, file: TextIO | None = None) -> None:
        """Print, on the main process alone: `Accelerator.print` does on each machine."""
        if self.is_main:
            print(text, file=file, flush=True)

    @property
    def told_to_stop(self) -> float:
        """What this rank adds to a reduce's `stops`: 0 without a signal, 1 for SIGINT, SIGTERMS for SIGTERM."""
        return {0: 0.0, signal.SIGINT: 1.0}.get(self.stop.signum, SIGTERMS)

    def log(self, row: Mapping[str, Any]) -> None:
        """Add a row to metrics.jsonl and to the trackers; the main process's counts."""
        if self.is_main:
            self.files.append(row)
        self.accelerator.log(row, step=int(row["step"]))

    def decide(
        self,
        *,
        loss: float = 0.0,
        stops: float = 0.0,
        reading: Reading | None = None,
        step: int = 0,
        saved: bool = False,
    ) -> None:
        """Decide, from figures that are the same on every rank, whether the run goes on.

        loss: any that was computed. stops: the sum of all ranks' `told_to_stop`: where there is any, the run saves a
        checkpoint, and stops when it is `saved`. reading: an audit's, of a step.

        Raises NotFinite, AuditFailed, Stopped.
        """
        if not math.isfinite(loss):
            raise NotFinite(self._not_finite(loss))
        if reading:
            self._judge(reading, step)
        self.stopping = self.stopping or stops > 0
        if self.stopping and saved:
            signum = signal.SIGTERM if stops >= SIGTERMS else signal.SIGINT
            why = "as the launcher is gone" if self.stop.orphaned else f"by {signum.name}"
            stopped = Stopped(f"stopped {why}")
            stopped.exit_code = 128 + signum
            raise stopped

    def _not_finite(self, loss: float) -> str:
        """Return what is wrong, and what to try."""
        config, times = self.config, float(self.shards.batch_size)
        if config.normalize == "rank":
            times /= self.shards.cells
        if target_reduction(config) == "sum" and steps_by_lr(config):
            lr = f"{config.learning_rate / times:.3g}"
            remedy = f"--lr {lr} (a sum's step is {times:g} times the mean's), or --reduction mean"
        else:
            remedy = f"a smaller --lr than {config.learning_rate:g}"
        return (
            f"the loss is {loss}, under --reduction {config.reduction} --normalize {config.normalize}: "
            f"start a new run with {remedy}; ended"
        )

    def _judge(self, reading: Reading, step: int) -> None:
        """Raise AuditFailed for more than `--audit-fail` allows, except in a step that fp16's overflow skips."""
        config, excess = self.config, max(reading.grad_rel_err, reading.replica_drift)
        skipped = self.accelerator.scaler is not None and not math.isfinite(excess)
        if config.audit_fail is not None and not excess <= config.audit_fail and not skipped:
            raise AuditFailed(
                f"audit failed: at step {step} rank {reading.rank}'s gradient is {reading.grad_rel_err:.3g} (relative) "
                f"off one process's, the replicas {reading.replica_drift:.3g} apart, more than --audit-fail allows "
                f"({config.audit_fail:g}), under --reduction {config.reduction} --normalize {config.normalize} "
                f"--tail {config.tail} --updater {config.updater},"
            )

    def keep(self, net: nn.Module, summary: Mapping[str, Any]) -> None:
        """Write the final weights and the last epoch's row; print the results."""
        from safetensors.torch import save_file

        from loop.run import console
        from loop.run.checkpoints import failing_as_os_error

        if self.is_main:
            model, skipped = self.folder / "model.safetensors", self.progress.skipped_steps
            with failing_as_os_error(self.folder):
                save_file(self.accelerator.unwrap_model(net).state_dict(), model)
            kept, lines = {**summary, "skipped_steps": skipped}, [console.results(summary, skipped)]
            if self.config.virtual_ranks:
                kept["weights_sha256"] = hashlib.sha256(model.read_bytes()).hexdigest()
                lines.append(f"SHA-256 of {model.name}, on any number of ranks: {kept['weights_sha256']}")
            write_json(self.folder / "summary.json", kept)
            print(*lines, console.last_batch(self.config, self.shards), sep="\n")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> bool:
        together = error is None or isinstance(error, RunEnded)  # all ranks end
        if together:
            self.watchdog.ended.set()  # the others' beats may end while this one's trackers take their time
        handled = together or self._report(error)
        if isinstance(error, RunEnded):
            self.exit_code = error.exit_code
            reason = f"{error} after step {self.progress.step}"
            then = f" {self.how_to_go_on()}" if error.goes_on else ""
            self.say(f"train.py: {reason}.{then}", file=sys.stderr)
            self.failed = not isinstance(error, Stopped)
            if self.failed and self.is_main:
                with suppress(OSError):  # the line above has said it
                    write_json(self.folder / FAILED, {"reason": reason, "step": self.progress.step})
        elif error is None:
            self.exit_code = 0
        self.stop.handled.set()
        self._finish_trackers()
        # When the process ends, as the next run may use the group. NCCL would wait for ranks that do not end.
        (atexit.register if together else atexit.unregister)(launch.leave_ranks)
        self.at_end.close()
        return handled

    def _report(self, error: BaseException | None) -> bool:
        """Print in one line, if this rank is to report it, why the run cannot go on; return whether that is known."""
        from loop.run.watchdog import first_line, is_from_backend

        assert error
        if isinstance(error, InputError):  # train.py prints it, on the ranks that report errors
            if self.watchdog.is_first_to_fail() and not launch.reports_errors():
                print(f"train.py: error: {error}", file=sys.stderr, flush=True)
            return False
        line = f"the run cannot be saved: {error}" if isinstance(error, OSError) else None
        if NOT_DETERMINISTIC in str(error):  # on this device; torch names the operation
            line = f"--virtual-ranks {self.config.virtual_ranks}: {first_line(error).partition(',')[0]}"
        if is_from_backend(error):
            cause = self.watchdog.cause() or "a collective failed"
            line = f"{cause} (the backend: {first_line(error)})"
        if self.watchdog.is_first_to_fail() and line:
            print(f"train.py: error: {line}. {self.how_to_go_on()}", file=sys.stderr)
        return line is not None

    def _end_as_lost(self, cause: str | None) -> None:
        self._end_alone(1, cause and f"error: {cause}")  # None where another rank reports it

    def _end_alone(self, exit_code: int, line: str | None) -> None:
        """End the process from a thread: its main thread may wait for other ranks. line: what to print, or None."""
        self.exit_code = exit_code
        try:
            if line:
                print(f"train.py: {line}. {self.how_to_go_on()}", file=sys.stderr, flush=True)
            self._finish_trackers()  # but not the folder: a last checkpoint counts its rows
            sys.stdout.flush()
        finally:
            os._exit(exit_code)

    def _finish_trackers(self) -> None:
        """End the tracker, once: as `Accelerator.end_training`, with an exit code, but the ranks' group stays."""
        while self.accelerator.trackers:
            tracker = self.accelerator.trackers.pop()
            tracker.exit_code = self.exit_code
            tracker.finish()

    def how_to_go_on(self) -> str:
        """Return in one sentence what is kept of a run that failed."""
        return how_to_go_on(getattr(self, "folder", None))
