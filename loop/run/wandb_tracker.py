"""Weights & Biases beside metrics.jsonl: it never prompts, waits seconds at most, and its faults end no training.

What is missing there is listed at the end. wandb needs this order: a failed online start is torn down before the
offline one; `teardown` completes the file on disk. Its log is flushed every second: a SIGKILL loses a second of rows.
"""

from __future__ import annotations

import functools
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from accelerate.tracking import GeneralTracker

from loop.config import Config, InputError, wandb_mode
from loop.effect import divisors as divisors_of
from loop.effect import example_weights
from loop.run.folder import RunFolder, plain

PROJECT = "chapter3-data-parallel"
REQUEST_S, INIT_S, FINISH_S = 8, 5, 15  # W&B adds up to 13 s of its own to INIT_S
SUMMARIES = {"train/loss": "min,last", "test/loss": "min,last", "train/acc": "max,last", "test/acc": "max,last"}
SUMMARIES |= {"step/grad_norm": "max,last", "audit/replica_drift": "max,last", "time/examples_per_s": "max,last"}


class Mode(NamedTuple):
    """How W&B takes part in a run, and why."""

    name: Literal["online", "offline", "disabled"]
    reason: str


def choose_mode(config: Config) -> Mode:
    """Decide as --wandb says; for `auto` as WANDB_MODE says; else online where a key is good and the server answers.

    Asks the server for REQUEST_S seconds at most, and not at all without a key. Raises InputError where --wandb online
    cannot be had, or W&B refuses one of its variables.
    """
    told = wandb_mode()
    for name in [name for name, value in os.environ.items() if name.startswith("WANDB_") and not value]:
        del os.environ[name]  # which W&B takes for a value
    if told:
        os.environ["WANDB_MODE"] = told  # W&B takes none in upper case
    asked = (told or "auto") if config.wandb == "auto" else config.wandb
    source = "WANDB_MODE" if config.wandb == "auto" else "--wandb"
    if asked == "disabled":
        return Mode("disabled", source)
    _refuse_what_wandb_would()
    if asked in ("offline", "dryrun"):
        return Mode("offline", f"{source} {asked}")
    reason = _why_not_online()
    if reason and config.wandb == "online":
        raise InputError(f"--wandb online is not available: {reason}")
    return Mode("offline", reason) if reason else Mode("online", "logged in")


def _refuse_what_wandb_would() -> None:
    """Raise InputError for a WANDB_ variable for which W&B would switch itself off when the run has begun."""
    import wandb

    try:
        wandb.Settings().update_from_env_vars(dict(os.environ))
    except ValueError as error:
        reason = in_one_line(error).partition(" [type=")[0]  # pydantic adds the input, and a link
        raise InputError(f"W&B refuses a WANDB_ variable: {reason}") from None


@functools.cache  # a sweep asks once
def _why_not_online() -> str | None:
    os.environ.setdefault("WANDB_HTTP_TIMEOUT", str(REQUEST_S))
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it would retry for 10 s at the end if the server is gone
    try:
        import wandb

        if wandb.setup(settings=wandb.Settings(silent=True)).settings.mode == "offline":
            return "`wandb offline` was called here"
        return None if wandb.login(prompt=False, verify=True) else "no API key: `wandb login`, or WANDB_API_KEY"
    except Exception as error:
        return in_one_line(error)


def in_one_line(error: Exception) -> str:
    """Return an error's text without its line breaks, abridged."""
    return " ".join(str(error).split())[:300]


def make_tracker(config: Config) -> list[WandbTracker]:
    """Return the W&B tracker in the mode that `choose_mode` returns, or none where W&B is disabled."""
    mode = choose_mode(config)
    if mode.name != "disabled":
        return [WandbTracker(config, mode)]
    if config.wandb == "auto":
        print(f"W&B: disabled ({mode.reason})", flush=True)
    return []


class WandbTracker(GeneralTracker):  # type: ignore[misc]  # untyped
    """The tracker behind Accelerate's `log_with` that writes to W&B; lives on the main process.

    files: the run's folder, which holds every row; to be set before `init_trackers`.
    exit_code: what `finish` reports; to be set before where the run has not succeeded.
    """

    name = "wandb"
    requires_logging_directory = False
    tracker: Any = None  # the W&B run
    files: RunFolder

    def __init__(self, config: Config, mode: Mode) -> None:
        import wandb

        super().__init__()
        self.wandb, self.config, self.mode = wandb, config, mode
        self.exit_code = self.examples = 0
        self.last_row = -1  # of metrics.jsonl, seen here
        self.held = 0  # rows that W&B had before
        self.beside: dict[str, Any] = {}  # what goes with the next row
        self.failed = False

    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        """Start the W&B run with this configuration: offline if it cannot be had online, not at all if not offline.

        Raises InputError where --wandb online cannot be had.
        """
        self.tracker = self._start(values)
        print(f"W&B: {self.mode.name} ({self.mode.reason})", flush=True)
        if self.tracker is not None:
            self._safely(self._define_metrics)
            self._safely(lambda: self.beside.update(last_step=self._last_step_table(values)))
            self._safely(self._count_held)
            for row in self.files.read():  # of a run that goes on: W&B may have less of it, or more
                self.log(row)

    def _start(self, values: Mapping[str, Any]) -> Any:
        try:
            return self._init(values)
        except Exception as error:
            reason = in_one_line(error)
        if self.config.wandb == "online":
            self.files.discard()
            raise InputError(f"--wandb online is not available: {reason}")
        self.mode = Mode("offline", reason)
        try:
            self.wandb.teardown()
            return self._init(values)
        except Exception as error:
            self.mode = Mode("disabled", in_one_line(error))
            return None

    def _define_metrics(self) -> None:
        self.tracker.define_metric("examples")
        self.tracker.define_metric("*", step_metric="examples")
        for key, summary in SUMMARIES.items():
            self.tracker.define_metric(key, step_metric="examples", summary=summary)

    def _init(self, values: Mapping[str, Any]) -> Any:
        folder = self.files.path
        return self.wandb.init(
            mode=self.mode.name,
            dir=str(folder),
            id=values["wandb_id"],
            resume="allow",  # the same id goes on with the same curves
            name=folder.name,
            project=self.config.wandb_project or os.environ.get("WANDB_PROJECT") or PROJECT,
            entity=self.config.wandb_entity,
            group=self.config.group,
            job_type="train",
            tags=list(self.config.tags),
            notes=self.config.notes,
            config=plain(values),
            settings=self.wandb.Settings(
                program=sys.argv[0],  # which a sweep's runs are given, too
                silent=True,
                x_transaction_log_flush_interval=1,
                init_timeout=INIT_S,
                finish_timeout=FINISH_S,
                finish_timeout_raises=True,
            ),
        )

    def _last_step_table(self, values: Mapping[str, Any]) -> Any:
        """Who holds how many examples of the epoch's last step, what one weighs, what the rank's updater divides by."""
        sizes, ranks = values["last_step_sizes"], values["world_size"]
        weights = example_weights(self.config.reduction, self.config.normalize, sizes)
        divisors = divisors_of(self.config, sizes, ranks)
        rows = [
            [i % ranks, i // ranks, size, weight * sum(sizes), divisors[i % ranks]]
            for i, (size, weight) in enumerate(zip(sizes, weights, strict=True))
        ]
        columns: list[str | int] = ["rank", "micro-batch", "examples", "example weight x n", "divided by"]
        return self.wandb.Table(columns=columns, data=rows)

    def log(self, values: Mapping[str, Any], step: int | None = None, **_: Any) -> None:
        """Log a row, as W&B's step of its number, unless W&B has it; alert on a loss that is not finite."""
        if self.tracker is None:
            return
        self.last_row += 1
        if self.last_row < self.held:
            return
        self.examples = values["examples"]
        self._safely(lambda: self.tracker.log({**values, **self.beside}, step=self.last_row))
        self.beside = {}
        losses = {key: value for key, value in values.items() if key.endswith("/loss") and not math.isfinite(value)}
        if losses:
            text = f"{losses} at step {step}; --reduction {self.config.reduction}, lr {self.config.learning_rate:g}"
            self._safely(lambda: self.tracker.alert("The loss is not finite", text, level="ERROR"))

    def finish(self) -> None:
        """Upload curves and weights, end the W&B run with `exit_code`, and print where it is and what it lacks."""
        if self.tracker is None:
            return
        there = (self.files.path / "metrics.jsonl").exists()  # else W&B's file was deleted with the run's folder
        if self.exit_code == 0:
            self._safely(self._log_curves)
            self._safely(self._log_model)
        if there:
            self._safely(self._summarize)
        uploaded = self._safely(lambda: self.tracker.finish(exit_code=self.exit_code))
        self._safely(self.wandb.teardown)
        if there:
            self._say_where(uploaded)

    def _log_curves(self) -> None:
        self.tracker.log({"curves": self.wandb.Image(str(self.files.path / "curves.png"))}, step=self.last_row)

    def _log_model(self) -> None:
        model = self.wandb.Artifact(f"model-{self.tracker.id}", type="model", metadata={"examples": self.examples})
        model.add_file(str(self.files.path / "model.safetensors"))
        self.tracker.log_artifact(model, aliases=["latest", "final"])

    def _summarize(self) -> None:
        """Set the summaries from all rows: W&B's own cover those of this process, and not what came before a resume."""
        self.tracker.log({}, step=self.last_row, commit=True)  # else the last row would replace what is set here
        rows = self.files.read()
        for key, rule in SUMMARIES.items():
            values = [float(row[key]) for row in rows if key in row]
            best = min if rule.startswith("min") else max
            if finite := [value for value in values if math.isfinite(value)]:
                self.tracker.summary[key] = {best.__name__: best(finite), "last": values[-1]}
        written = self.files.path / "summary.json"
        weights = json.loads(written.read_text()).get("weights_sha256") if written.exists() else None
        if weights:
            self.tracker.summary["weights_sha256"] = weights

    def _count_held(self) -> None:
        """Note how many of the run's rows W&B has from before: on its server, or in earlier files."""
        if self.mode.name == "online":
            self.held = int(self.tracker.starting_step)
        else:
            earlier = [folder for folder in self._offline_folders() if folder != Path(self.tracker.settings.sync_dir)]
            self.held = sum(count_rows(folder) or 0 for folder in earlier)

    def _offline_folders(self) -> list[Path]:
        return sorted((self.files.path / "wandb").resolve().glob("offline-run-*"))

    def _say_where(self, uploaded: bool) -> None:
        directory, logged = Path(self.tracker.settings.sync_dir), self.last_row + 1 - self.held
        stored = count_rows(directory)
        whole_rows = (self.files.path / "metrics.jsonl").read_bytes().count(b"\n")
        kept = f"metrics.jsonl has {whole_rows}"
        if stored is None:
            print(f"W&B: its file in {from_here(directory)} cannot be read back; {kept} rows", file=sys.stderr)
        elif stored < logged:
            print(f"W&B: {logged - stored} of {logged} rows are not in its file; {kept}", file=sys.stderr)
        if self.mode.name == "online" and uploaded and not self.failed:
            print(f"W&B: {self.tracker.url}")
        elif self.mode.name == "online":
            print(f"W&B: not everything arrived; to send it: wandb sync --no-skip-online {from_here(directory)}")
        else:
            # One by one: a call for all would end at one that a kill has torn.
            calls = [f"wandb sync {from_here(folder)}" for folder in self._offline_folders()]
            print(f"W&B: to send this run: {'; '.join(calls)}")

    def _safely(self, call: Callable[[], object]) -> bool:
        """Make a call that may fail without harm to the training: warn at the first failure."""
        try:
            call()
        except Exception as error:
            if not self.failed:
                print(f"W&B failed, training goes on ({in_one_line(error)})", file=sys.stderr, flush=True)
            self.failed = True
            return False
        return True


def from_here(path: Path) -> str:
    """Return a path as the shell takes it, relative to the current folder where it lies in it."""
    return shlex.quote(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))


def count_rows(directory: Path) -> int | None:
    """Return how many history rows a run's .wandb file holds; None where it cannot be read."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(directory)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=20, check=False, text=True)
        kinds = [json.loads(line)["type"] for line in done.stdout.splitlines()]
    except (OSError, subprocess.SubprocessError, ValueError, KeyError):
        return None
    return None if done.returncode and not kinds else kinds.count("history")
