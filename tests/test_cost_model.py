"""The cost model's formulas; what it measures is measured where it runs."""

from __future__ import annotations

import pytest

from scripts import cost_model


def test_one_rank_reduces_nothing_and_many_pay_the_link_twice() -> None:
    assert cost_model.ring(1, 1e6, 1e-5, 1e9) == 0
    assert cost_model.ring(4096, 1e6, 0, 1e9) == pytest.approx(2e-3, rel=1e-3)
    assert cost_model.tree(4096, 1e6, 1e-5, 1e9) == pytest.approx(24 * 1e-5 + 2e-3)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_fit_finds_the_network_that_made_the_times(world_size: int) -> None:
    alpha, beta = 2e-4, 1.5e9
    made = {size: cost_model.ring(world_size, size, alpha, beta) for size in cost_model.SIZES}
    assert cost_model.fit(world_size, made) == pytest.approx((alpha, beta))


def test_extending_finds_where_a_ring_takes_longer_than_the_compute(capsys: pytest.CaptureFixture[str]) -> None:
    cost_model.extend(1e-5, 25e9, 102e6, 80e-3)
    said = capsys.readouterr().out
    assert "A ring takes longer than the compute from W = 3594 on." in said  # 2 (W - 1) 10 us + 8.16 ms > 80 ms


def test_a_plain_loop_halves_imagenets_last_step(capsys: pytest.CaptureFixture[str]) -> None:
    cost_model.bias()
    said = capsys.readouterr().out  # 143 left of 256: 35 of 64 ranks full, one with 3, 28 idle
    assert (
        "batch    256, W   64, n =   143: ragged 0.559 to 0.745, 0.562, 28 idle; spread 0.745 to 1.117, 1.000" in said
    )
