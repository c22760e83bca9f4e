"""The gallery's findings as numbers on small runs; its pages, whose blocks it rewrites and nothing else."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

import pytest
import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from loop.book import evaluate, train_epoch_ch3
from loop.config import InputError
from loop.data import EvalBatches, Split
from loop.effect import example_weights
from loop.files import write_whole
from loop.reduction import Normalize, Reduction
from scripts.gallery import __main__ as gallery
from scripts.gallery import drawing, figures, probes
from scripts.gallery.figures import last_batch
from scripts.runs import Run
from tests.cases import flat_gradient, relative_distance, toy_config, toy_split, train_here
from tests.ranks import World

REDUCTIONS, NORMALIZES = get_args(Reduction), get_args(Normalize)


def small_fashion_mnist(examples: int) -> Split:
    images, labels = probes.data()[0][:2]
    return Split(images[:examples], labels[:examples])


# ---- claim 1


def test_a_gradient_never_zeroed_is_the_sum_of_all_so_far() -> None:
    batches = list(EvalBatches(toy_split(40), batch_size=16))
    net, loss = probes.fresh("softmax"), nn.CrossEntropyLoss()
    wanted = sum(probes.gradient(net, loss(net(X), y)) for X, y in batches)
    train_epoch_ch3(net, batches, loss, probes.NeverZeroed(torch.optim.SGD(net.parameters(), lr=0)))
    assert torch.allclose(flat_gradient(net), wanted, rtol=1e-5, atol=1e-7)


def test_zeroing_before_each_backward_throws_micro_batches_away(monkeypatch: pytest.MonkeyPatch) -> None:
    small = small_fashion_mnist(5120)
    monkeypatch.setattr(probes, "data", lambda: (small, small))
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    after, before = (probes.accelerate_losses(accelerator, 4, zero_first)[-1] for zero_first in (False, True))
    assert after < 1.2 < 1.4 < before


# ---- claims 2 and 3


@pytest.mark.parametrize("sizes", [(96,), (64, 32, 0, 0), (33, 32, 31), (1, 0, 0)])
@pytest.mark.parametrize("normalize", NORMALIZES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_autograd_weighs_examples_as_the_table_says(
    reduction: Reduction, normalize: Normalize, sizes: tuple[int, ...]
) -> None:
    measured = probes.applied_weights(reduction, normalize, torch.rand(sum(sizes), dtype=torch.float64), sizes)
    predicted = zip(example_weights(reduction, normalize, sizes), sizes, strict=True)
    wanted = torch.tensor([weight for weight, size in predicted for _ in range(size)], dtype=torch.float64)
    assert torch.allclose(measured, wanted, rtol=1e-12)


@pytest.mark.parametrize("world_size", [2, 4, 8, 16, 32, 64])
def test_the_books_last_batch_by_brute_force(world_size: int) -> None:
    left, weights = 96, []
    for _ in range(world_size):
        mine = min(left, 256 // world_size)
        weights += [96 / (world_size * (mine or 1))] * mine
        left -= mine
    ours = probes.effect_of_tail(world_size)
    assert (ours.lightest, ours.heaviest) == pytest.approx((min(weights), max(weights)), rel=1e-12)
    assert ours.length == pytest.approx(sum(weights) / 96, rel=1e-12)


# ---- claim 4


def test_sum_at_lr_over_n_is_the_mean_where_batches_are_full() -> None:
    mean = toy_config(batch_size=16)
    by_mean, by_sum = (train_here(config, 64).weights for config in (mean, toy_config(batch_size=16, reduction="sum")))
    assert relative_distance(by_sum, by_mean) < 1e-12


def test_on_ranks_a_plain_loops_sum_wants_w_times_that(world: Callable[[int], World]) -> None:
    mean = train_here(toy_config(batch_size=16), 64).weights
    plain = toy_config(batch_size=16, reduction="sum", normalize="rank", lr=2 * 0.05 / 16)
    for ours in world(2).run(train_here, plain, 64):
        assert relative_distance(ours.weights, mean) < 1e-12
    for ours in world(2).run(train_here, replace(plain, lr=0.05 / 16), 64):
        assert relative_distance(ours.weights, mean) > 0.01


def test_sum_at_the_means_lr_spoils_the_mlp_and_only_the_loss_of_softmax_regression() -> None:
    batches = EvalBatches(small_fashion_mnist(15_360), batch_size=256)
    per_example = nn.CrossEntropyLoss(reduction="none")
    results = {}
    for name, reduction in itertools.product(("softmax", "mlp"), ("mean", "sum")):
        net = probes.fresh(name)
        train_epoch_ch3(net, batches, nn.CrossEntropyLoss(reduction=reduction), torch.optim.SGD(net.parameters(), 0.1))
        results[name, reduction] = net, *evaluate(net, batches, per_example)
    assert results["softmax", "sum"][1] > math.log(10) > results["softmax", "mean"][1]
    assert results["softmax", "sum"][2] > 3 * 0.1, "three times chance"
    assert results["mlp", "sum"][2] < results["mlp", "mean"][2] / 2
    assert probes.dead_units(results["mlp", "sum"][0]) > 0.5
    accuracy = evaluate(results["softmax", "sum"][0], EvalBatches(probes.data()[1]))[1]
    loss, shrunk = probes.shrunken(results["softmax", "sum"][0], 1 / 256)
    assert shrunk == accuracy, "which logit is largest does not depend on their scale"
    assert loss < math.log(10), "what a net has that knows nothing of ten classes"


# ---- claim 5


def test_means_of_means_are_off_and_sums_are_not() -> None:
    losses = torch.rand(352, generator=torch.Generator().manual_seed(0)) * torch.arange(352)
    off = probes.reported_losses(losses, orders=3)
    assert max(off.pop("sum of float(l) x len(y), over N")) < 1e-6
    assert all(max(values) > 1e-3 for values in off.values())
    order = losses[probes.epoch_order(352, 0, 0)].double()
    ranks = [[*order[0:64], *order[256:320]], [*order[64:128], *order[320:352]], order[128:192], order[192:256]]
    mean_of_means = sum(sum(rank) / len(rank) for rank in ranks) / 4
    assert off["4 ranks"][0] == pytest.approx(abs(float(mean_of_means / order.mean()) - 1), rel=1e-4)


# ---- claim 6


def test_replicas_drift_by_what_the_divisors_predict(world: Callable[[int], World]) -> None:
    config = toy_config(updater="scratch", reduction="sum", normalize="rank", tail="ragged", batch_size=16, epochs=1)
    first, second = world(2).run(train_here, config, 16 + 10)  # the last step: 8 and 2
    apart = torch.cat([(first.weights[name] - second.weights[name]).flatten() for name in first.weights])
    predicted = config.learning_rate * first.gradients[-1] * (1 / 8 - 1 / 2)
    assert float((apart + predicted).abs().max()) < 1e-14
    assert float(predicted.abs().max()) > 1e-3


# ---- claim 7 and beyond plain SGD


@pytest.mark.parametrize("accumulate", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("world_size", [1, 4])
def test_an_accumulated_tail_steps_short_by_the_share_of_cells_that_hold_something(
    world_size: int, accumulate: int
) -> None:
    length = probes.effect_of_tail(world_size, accumulate=accumulate).length
    cells = world_size * accumulate
    assert probes.effect_cells(world_size, accumulate) == -(-96 // (256 // cells))
    assert length == pytest.approx(probes.effect_cells(world_size, accumulate) / cells, rel=1e-12)


def test_clipping_makes_sum_and_mean_steps_equally_long() -> None:
    mean = toy_config(batch_size=16, clip_norm=1e-3)
    by_mean, by_sum = (train_here(replace(mean, reduction=reduction), 64) for reduction in REDUCTIONS)
    assert relative_distance(by_sum.weights, by_mean.weights) < 1e-8, "at one lr: torch adds 1e-6 to the norm"
    for a, b in zip(by_mean.gradients, by_sum.gradients, strict=True):
        assert float(b.norm() / a.norm()) == pytest.approx(16, rel=1e-4), "before clipping"


def test_adamw_hardly_notices_a_sum_where_decayed_sgd_does() -> None:
    adamw = toy_config(optimizer="adamw", lr=1e-3, batch_size=16)
    decay = toy_config(batch_size=16, weight_decay=0.1)
    scaled = replace(decay, reduction="sum", lr=decay.learning_rate / 16)
    (a, b), (c, d) = (
        [train_here(config, 64).weights for config in pair]
        for pair in ((adamw, replace(adamw, reduction="sum")), (decay, scaled))
    )
    assert relative_distance(b, a) < 1e-4 < 1e-3 < relative_distance(d, c)


def test_float16_loses_what_is_too_large_and_too_small() -> None:
    over, under = probes.lost_in_float16(torch.tensor([0.0, 1.0, 1e-8, 1e-3, 2.0]), [1.0, 65536.0])
    assert (over, under) == ([0, 0.5], [0.25, 0])


# ---- figures and pages


def tail_run(reduction: str, world_size: int, short: float) -> Run:
    """Three full steps and a short one, as an audit would see their lengths over the exact mean's."""
    lr, full = (0.1, 1.0) if reduction == "mean" else (0.1 / 256, 256 / world_size)
    scales = [full, full, full, short]
    curves = {"audit/grad_scale": list(enumerate(scales)), "step": [(i, i + 1) for i in range(4)]}
    return Run("run", Path(), {"lr": str(lr), "world_size": str(world_size)}, curves, finished=True)


def test_a_caption_holds_the_runs_own_numbers_and_no_finding_is_drawn_that_does_not_hold() -> None:
    runs = {
        "tail-mean": [tail_run("mean", 1, 1.0), tail_run("mean", 4, 0.3)],
        "tail-sum": [tail_run("sum", 1, 96.0), tail_run("sum", 4, 24.0)],
    }
    figure, finding = drawing.paint(figures.tail, runs)
    assert "The sum's is 0.375" in finding.one
    assert "is 0.3 of what it should be" in finding.several
    assert figure.get_suptitle() == finding.title
    runs["tail-mean"][0] = tail_run("mean", 1, 0.9)
    with pytest.raises(probes.DoesNotHoldError, match=r"0\.9"):
        drawing.paint(figures.tail, runs)


PICTURES = {name: gallery.picture_of(name) for name in gallery.FIGURES} | {"train": gallery.PICTURES / "train.png"}
NO_AXES = ["hero"]  # boxes, with a key


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_has_a_short_title_and_a_unit_on_every_axis(name: str) -> None:
    with Image.open(PICTURES[name]) as picture:
        title, labels = picture.info["Title"], json.loads(picture.info["Labels"])
        assert picture.width >= 900
    assert 1 <= len(title.split()) <= 8
    assert bool(labels) == (name not in NO_AXES)
    assert [label for label in labels if label not in drawing.NO_UNIT and not re.search(r"\(.+\)$", label)] == []


def draw_nothing(figure: Figure, runs: probes.Runs, title: str = "Short", label: str = "step") -> drawing.Finding:
    drawing.panels(figure, xlabel=label, ylabel="loss (nats)")
    return drawing.Finding(title, "", "")


def test_a_long_title_and_an_axis_without_its_unit_are_refused() -> None:
    figure, _ = drawing.paint(draw_nothing, {})
    assert drawing.labels(figure) == ["step", "loss (nats)"]
    with pytest.raises(ValueError, match="more than 8 words: a b c d e f g h i"):
        drawing.paint(partial(draw_nothing, title="a b c d e f g h i"), {})
    with pytest.raises(ValueError, match=r"without a unit: \['loss'\]"):
        drawing.paint(partial(draw_nothing, label="loss"), {})
    with pytest.raises(ValueError, match=r"without a unit: \[''\]"):
        drawing.paint(partial(draw_nothing, label=""), {})


# ---- the hero


def test_who_counts_in_the_last_batch_by_hand() -> None:
    """897 = 3 x 256 + 129; weights are times 129, and a rank's own mean is divided by 4 ranks."""
    shares = [row.shares for row in last_batch.of_examples()]
    mean = 129 / (4 * 33)  # 897 = 4 x 224 + 1: each rank has 225 = 3 x 64 + 33, and 4 x 225 - 897 = 3 are copies
    assert shares[0] == [(129, 0, pytest.approx(1))]
    assert shares[1] == [(33, 0, pytest.approx(mean)), *[(32, 1, pytest.approx(mean))] * 3]
    half = pytest.approx(129 / 256)
    assert shares[2] == [(64, 0, half), (64, 0, half), (1, 63, half), (0, 64, half)]
    assert shares[3] == [(64, 0, None), (64, 0, None), (1, 0, None), (0, 0, None)]
    assert [share[:2] for share in shares[4]] == [(64, 0), (64, 0), (1, 0), (0, 0)]
    assert [share.weight for share in shares[4][:3]] == pytest.approx([129 / 256, 129 / 256, 129 / 4])
    assert [share.weight for share in shares[5][:3]] == pytest.approx([1, 1, 1])


def test_what_a_token_weighs_by_hand() -> None:
    """200 tokens: 200 / (4 x 100), 200 / (4 x 50), 200 / (4 x 40), 200 / (4 x 10)."""
    own, exact = (row.shares for row in last_batch.of_tokens())
    assert own == [(100, 0, 0.5), (50, 0, 1), (40, 0, 1.25), (10, 0, 5)]
    assert [share.weight for share in exact] == pytest.approx([1, 1, 1, 1])


def test_the_heros_words_hold_its_numbers() -> None:
    figure, finding = drawing.paint(figures.hero, {})
    words = [text.get_text() for text in figure.axes[0].texts]
    assert {"3 count twice", "127 count twice", "hangs: rank 3\nhas no batch", "one counts 32 times"} <= set(words)
    assert [words.count(number) for number in ("0.98", "0.50", "32", "1.25", "5.00", "1.00", "idle", "ended")] == [
        4, 4 + 2 + 1, 1, 1, 1, 1 + 3 + 1 + 4, 2, 1,
    ]  # fmt: skip
    assert "adds 3 copies" in finding.several
    assert "default adds 127" in finding.several


def test_a_block_is_rewritten_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- gallery: x -->\nold\n<!-- end -->\nb\n<!-- gallery: y -->\nkept\n<!-- end -->\n")
    write_whole(page, gallery.replaced(page, "x", "new").encode())
    assert page.read_text() == (
        "a\n<!-- gallery: x -->\n\nnew\n\n<!-- end -->\nb\n<!-- gallery: y -->\nkept\n<!-- end -->\n"
    )
    again = gallery.replaced(page, "x", "new")
    assert again == page.read_text()
    with pytest.raises(InputError, match=r"gallery: z --> \.\.\. <!-- end --> is not there"):
        gallery.replaced(page, "z", "")
    page.write_text("<!-- gallery: x -->\nold\n<!-- gallery: y -->\n<!-- end -->\n")
    with pytest.raises(InputError, match="not closed"):
        gallery.replaced(page, "x", "")


def test_links_lead_from_the_page_and_a_block_may_stand_on_several_pages_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    front, deep, bare = tmp_path / "README.md", tmp_path / "scripts" / "README.md", tmp_path / "bare.md"
    deep.parent.mkdir()
    for page in (front, deep):
        page.write_text("<!-- gallery: x --><!-- end -->")
    bare.write_text("nothing")
    monkeypatch.setattr(gallery, "PAGES", [front, deep, bare, tmp_path / "missing.md"])
    monkeypatch.setattr(gallery.sweep, "ROOT", tmp_path)
    assert gallery.holding("x") == [front, deep]
    assert gallery.holding("y") == []
    text = "![a](scripts/a.png) [b](tests/b.py) [c](https://c/d) [e](#f)"
    assert text in gallery.replaced(front, "x", text)
    assert "![a](a.png) [b](../tests/b.py) [c](https://c/d) [e](#f)" in gallery.replaced(deep, "x", text)


def test_a_block_without_a_page_is_left_out_unless_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gallery, "PAGES", [])
    assert gallery.make(["train"], tmp_path, whole=True) == 0
    with pytest.raises(InputError, match="--only train: no page has <!-- gallery: train -->"):
        gallery.make(["train"], tmp_path, whole=False)


def test_every_figure_has_its_place_its_function_and_its_picture() -> None:
    from scripts.gallery import blocks

    assert all(gallery.PAGE in gallery.holding(name) for name in gallery.FIGURES)
    for name in gallery.NEEDS:
        assert callable(getattr(figures if name in gallery.FIGURES else blocks, name))
        for page in gallery.holding(name):
            gallery.replaced(page, name, "")
    gallery.replaced(gallery.PAGE, gallery.WHOLE, "")
    assert {study for studies in gallery.NEEDS.values() for study in studies} == set(gallery.STUDIES)
    assert {*gallery.PICTURES.glob("*.png")} == {*PICTURES.values(), gallery.PICTURES / "report.png"}
    assert all(picture.stat().st_size < 70_000 for picture in PICTURES.values())


def test_every_study_can_be_run_and_no_two_runs_share_a_folder(tmp_path: Path) -> None:
    planned = [run for study in gallery.STUDIES for run in gallery.planned_runs(study, tmp_path)]
    assert len({run.folder for run in planned}) == len(planned)
    assert len({run.launch_key for run in planned}) == 4, "a launch a world size"
