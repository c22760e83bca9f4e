"""parity: right loops of every kind pass, wrong ones fail and their fault is named, hangs and crashes are told."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from loop import audit, parity
from tests import planted
from tests.forks import Forked
from tests.launches import environment

IN_THE_SUITE = {"wrong 1/W", "wrong means, adamw", "right tokens", "right accelerate", "wrong grew"}


def test_there_are_as_many_loops_as_the_readme_states() -> None:
    causes = {cause for cause, _ in planted.IN_STEPS.values()} | set(planted.WHOLE.values())
    assert (len(causes), len(planted.IN_STEPS) + len(planted.WHOLE), len(planted.RIGHT) + 2) == (21, 28, 24)


def some_slow(names: Any) -> list[Any]:
    """The names, all but a few of them marked as slow."""
    return [pytest.param(name, marks=[] if name in IN_THE_SUITE else pytest.mark.slow) for name in names]


def compared(name: str, **how: Any) -> parity.Report:
    data = planted.token_data() if "tokens" in name else planted.data()
    return parity.parity(getattr(planted, name), data=data, batch_size=20, masked=planted.MASKED, **how)


@pytest.mark.parametrize("name", some_slow(planted.RIGHT))
def test_a_right_loop_is_the_same_on_any_number_of_ranks(name: str) -> None:
    report = compared(name)
    assert report.same, str(report)
    of_ranks = [line for line in report.lines if line.startswith("W = ")]
    assert len(of_ranks) == 3
    assert len(report.lines) == 3 + (name in ("right bfloat16", "right autocast")), "too coarse for small faults"


@pytest.mark.parametrize("name", some_slow(planted.IN_STEPS))
def test_a_fault_is_found_and_named(name: str) -> None:
    cause = planted.IN_STEPS[name][0]
    report = compared(name)
    assert not report.same
    assert cause.name in report.causes[2], str(report)
    assert report.causes[3] == [cause.name], f"at W = 3 nothing else fits: {report}"


def test_a_training_that_deals_out_its_own_data_is_compared_too() -> None:
    report = parity.parity(getattr(planted, "right whole"))
    assert report.same, str(report)


@pytest.mark.parametrize("name", some_slow(planted.WHOLE))
def test_a_fault_in_the_dealing_is_named_by_the_examples_that_the_net_was_shown(name: str) -> None:
    report = parity.parity(getattr(planted, name))
    for world_size in (2, 3):
        assert report.causes[world_size] == [planted.WHOLE[name].name], str(report)


@pytest.mark.parametrize(
    "name",
    [
        "lazily",
        "by_hand",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("through_workers", "two_nets", "in_shards")),
    ],
)
def test_what_people_bring_is_no_false_alarm(name: str) -> None:
    report = parity.parity(getattr(planted, name), data=planted.data(), batch_size=20, world_sizes=[2])
    assert report.same, str(report)


def test_a_fault_of_one_of_two_optimizers_is_named() -> None:
    report = parity.parity(planted.two_nets_at_two_rates, data=planted.data(), batch_size=20, world_sizes=[3])
    assert report.causes == {3: [parity.UPDATE_W.of("W").name]}, str(report)


def test_a_loop_with_a_k_of_its_own_is_told_to_take_the_steps_it_is_dealt() -> None:
    report = parity.parity(planted.with_a_fixed_k, data=planted.data(), batch_size=20)
    assert str(report).startswith("one process took 1 steps for 3 that it was dealt: take K from len(micro_batches)")


@pytest.mark.slow  # 11 s
def test_a_program_that_tests_itself_is_imported_afresh_on_each_rank(tmp_path: Path) -> None:
    """Its first lines read what torchrun sets, and bind torch's clipping."""
    (tmp_path / "mine.py").write_text("""
import os
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import clip_grad_norm_
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 0))
def train(batches):
    torch.manual_seed(0)
    net = nn.Linear(6, 4).double()
    if WORLD_SIZE > 1:
        dist.init_process_group("gloo")
        net = nn.parallel.DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in batches:
        optimizer.zero_grad()
        for x, y in step:
            (nn.functional.cross_entropy(net(x), y, reduction="sum") / 20).backward()
        clip_grad_norm_(net.parameters(), 1e-3)
        optimizer.step()
    return net
if __name__ == "__main__":
    from loop.parity import parity
    from tests.planted import data
    print(parity(train, data=data(), batch_size=20, world_sizes=[3]))
""")
    how = [sys.executable, str(tmp_path / "mine.py")]
    done = subprocess.run(how, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."}, timeout=100)
    assert parity.FACTORS["1/W"].name in done.stdout, done.stdout + done.stderr


def test_ranks_that_each_take_all_examples_change_nothing_but_are_told() -> None:
    report = parity.parity(getattr(planted, "right all see all"), world_sizes=[2])
    assert report.same
    assert report.lines[1] == "    but every rank is shown all examples: that is W times the work"


def test_a_hang_is_cut_off_and_told_where_each_rank_waits() -> None:
    code, output = of_command("tests.planted:hangs --world-sizes 2 --timeout 3")
    assert code == 1
    line, other, advice, more = output.splitlines()
    where = r"has not ended after 3 s; it is in File .*planted.py., line \d+ in hangs"
    assert re.fullmatch(f"W = 2: rank 0 {where}", line)
    assert re.fullmatch(f" *rank 1 {where}", other)
    assert advice.strip() == "Every rank must take as many steps and micro-batches as every other"
    assert more.strip() == "A training that takes longer needs a longer timeout"


def test_a_ranks_exception_comes_back_whole() -> None:
    report = parity.parity(planted.raises, world_sizes=[2])
    lines = str(report).splitlines()
    assert lines[0] == "W = 2: rank 1 of 2: Traceback (most recent call last):"
    assert "in raises" in lines[1], "the first frame is the user's"
    assert lines[-1] == "KeyError: 'no such shard'"


@pytest.mark.parametrize("later", [0, 0.5])
def test_a_rank_that_ends_is_told_with_its_last_words_before_those_that_fail_with_it(later: float) -> None:
    with (
        parity.Ranks(2) as ranks,
        pytest.raises(parity.RankError, match="rank 1 of 2: at last\nended with exit code 7"),
    ):
        ranks.run(ends, later)


def ends(later: float) -> None:
    if os.environ["RANK"] == "0" and later:
        raise ConnectionResetError
    time.sleep(later)
    if os.environ["RANK"] == "1":
        print("at last", flush=True)
        os._exit(7)
    signal.pause()


@pytest.mark.parametrize("name", ["on_a_gpu", "over_nccl"])
def test_code_that_asks_for_a_gpu_gets_a_line_that_says_what_to_change(name: str) -> None:
    assert "ask torch.cuda.is_available() for the device, and take gloo without one" in str(
        parity.parity(getattr(planted, name), world_sizes=[1])
    )


def test_an_unseeded_training_cannot_be_compared_and_dropout_is_named() -> None:
    assert str(parity.parity(planted.unseeded)) == "two trainings of one process differ from each other: seed them"
    report = parity.parity(planted.with_dropout, data=planted.data(), batch_size=20, world_sizes=[2])
    assert not report.same
    assert "    Dropout makes what an example gives depend on its batch or on chance: compare without" in report.lines


def test_what_cannot_be_imported_by_name_is_refused() -> None:
    def local() -> None:
        """Nothing."""

    for function in (local, lambda: None, planted.Tokens().forward):
        with pytest.raises(ValueError, match="define the training at the top level of a module"):
            parity.parity(function)


def test_data_that_make_no_step_are_refused() -> None:
    x, y = planted.data()
    for data, batch_size in (((x, y[:-1]), 20), ((x, y), 11), ((x, y), 81), ((x, y), None)):
        with pytest.raises(ValueError, match="a batch_size from 12 to their number"):
            parity.parity(getattr(planted, "right mlp"), data=data, batch_size=batch_size)


def test_assert_parity_fails_with_the_report() -> None:
    with pytest.raises(AssertionError, match="the ranks begin with different weights"):
        parity.assert_parity(getattr(planted, "wrong starts apart"), world_sizes=[2])


@pytest.mark.parametrize("masked", [None, -100])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_each_step_has_the_same_examples_on_any_number_of_ranks(world_size: int, masked: int | None) -> None:
    one, steps = (parity.deal(planted.data(), 20, masked, size) for size in (1, world_size))
    assert [sum(step.sizes) for step in steps] == [20] * (3 if masked is None else 4)
    for step, whole in zip(steps, one, strict=True):
        x, y = (torch.cat(part) for part in zip(*step.cells(), strict=True))
        assert torch.equal(x, whole.x)
        assert torch.equal(y, whole.y)
    uneven, idle, even, *rest = steps
    assert 1 <= min(uneven.sizes) <= max(uneven.sizes) - 2
    assert sum(idle.sizes[world_size - 1 :: world_size] if world_size > 1 else idle.sizes[1:]) == 0
    assert max(even.sizes) - min(even.sizes[:-1]) <= 20 % len(even.sizes)
    assert [step.counts[0] for step in rest] == [0] * len(rest)


def test_causes_by_hand() -> None:
    """Two ranks, two micro-batches: cells of 1, 1, 1 and 3 examples, with mean gradients 1, 2, 4, 8, each its way."""
    own, counts = torch.tensor([1, 2, 4, 8], dtype=torch.float64), [1, 1, 1, 3]
    cells = tuple(own.diag())
    whole = torch.tensor([1, 2, 4, 24], dtype=torch.float64) / 6

    def named(*gradient: float, cells: Any = cells) -> list[str]:
        applied = [torch.tensor(gradient, dtype=torch.float64)] * 2
        how = {"cells": cells, "counts": counts} if cells else {}
        return [cause.name for cause in parity.diagnose(applied, whole, allowed=1e-12, accumulate=2, **how)]

    assert named(1 / 4, 2 / 4, 4 / 4, 8 / 4) == [parity.MEANS.name]
    assert named(1 / 4, 1 / 4, 4 / 4, 6 / 2) == [parity.RANK_MEANS.name], "rank 0: 1/2, 4/2; rank 1: 2/4, 3 * 8/4"
    assert named(1 / 4, 2 / 4, 2 / 4, 12 / 4) == [parity.MICRO_MEANS.name], "first 1/2, 2/2; then 4/4, 3 * 8/4; over 2"
    assert named(0, 0, 4 / 2, 8 / 2) == [parity.LAST.name]
    assert named(2 / 6, 2 / 6, 12 / 6, 24 / 6) == [parity.WEIGHTS.of("2, 1, 3, 1").name]
    assert named(2 / 6, 4 / 6, 8 / 6, 48 / 6) == [parity.FACTORS["W"].name, parity.FACTORS["K"].name], "2 is both"
    assert named(4 / 6, 8 / 6, 16 / 6, 96 / 6) == [parity.FACTORS["W K"].name]
    assert named(1, 1, 1, 1, cells=None) == [parity.UNKNOWN.name]
    for other, cause in ((own.flip(0), parity.DIVERGED), (own * torch.tensor([0, 1, 0, 2]), parity.UNSYNCHRONISED)):
        applied = [own * torch.tensor([1, 0, 3, 0]), other]
        assert parity.diagnose(applied, whole, allowed=1e-12, accumulate=2, cells=cells, counts=counts) == [cause]


def test_examples_are_hashed_as_the_audit_hashes_them() -> None:
    x = planted.data()[0]
    assert parity._hashes(x) == audit._hashes([x]).tolist()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("tests.planted:raises --world-sizes 1", 0, ""),
        ("tests.planted:nothing", 2, "parity: error: module 'tests.planted' has no attribute 'nothing'"),
        ("tests.planted", 2, "parity: error: tests.planted: not of the form module:name"),
    ],
)
def test_the_exit_code_of_the_command(words: str, code: int, said: str) -> None:
    ended, output = of_command(words)
    assert ended == code, output
    assert said in output
    assert "Traceback" not in output


def of_command(words: str) -> tuple[int, str]:
    """What `python -m loop.parity` ends with and prints."""
    done = Forked([sys.executable, "-m", "loop.parity", *words.split()], environment())
    stdout, stderr = done.communicate(timeout=100)
    return done.returncode, stdout + stderr
