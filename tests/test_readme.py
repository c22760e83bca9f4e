"""The README: its code runs as written, its commands are accepted, the numbers under them come out again."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

import train
from loop.config import parse
from loop.reduction import cell_loss
from loop.run.console import last_batch
from scripts import recipes, sweep
from scripts.symptoms import __main__ as symptoms
from scripts.symptoms.loaders import PATIENCE_S, uneven_hang
from tests.cases import flat_gradient, flat_weights
from tests.ranks import World

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FILES = [ROOT / "README.md", *sorted((ROOT / "loop").rglob("*.md")), *sorted((ROOT / "scripts").rglob("*.md"))]
PAGES = [page.read_text(encoding="utf-8") for page in FILES]
SYMPTOMS = (ROOT / "scripts" / "symptoms" / "README.md").read_text(encoding="utf-8")
LAUNCHER = r"(?:[A-Z_]+=\S+ )*(?:python3? |bash |torchrun (?:--standalone )?--nproc_per_node (?P<ranks>\d+) )"


def blocks(language: str, pages: list[str] = PAGES) -> list[str]:
    """The pages' code blocks in a language."""
    fenced = rf"^```{language}\n(.*?)^```"
    return [block for page in pages for block in re.findall(fenced, page, re.MULTILINE | re.DOTALL)]


def commands(pages: list[str] = PAGES) -> list[tuple[str, str]]:
    """Each command of the pages, with the comment on the line below it ('' where there is none)."""
    lines = "\n".join(blocks("bash", pages)).replace("\\\n", " ").splitlines()
    found = [
        (line.split(" # ")[0].strip(), below.removeprefix("# ") if below.startswith("# ") else "")
        for line, below in zip(lines, [*lines[1:], ""], strict=True)
        if line and not line.startswith(("#", "export "))
    ]
    text = re.sub(r"^```.*?^```", "", "\n".join(pages), flags=re.MULTILINE | re.DOTALL)
    inline = re.findall(rf"`({LAUNCHER}[^`]+)`", text)
    return found + [(" ".join(command.split()), "") for command, _ in inline]


def program_of(command: str) -> tuple[str, list[str], int]:
    """What a command runs: a file or a module, its arguments, and on how many ranks."""
    launcher = re.match(LAUNCHER, command)
    assert launcher, f"how is this started: {command}"
    words = shlex.split(command[launcher.end() :])
    words = words[1:] if words[0] == "-m" else words
    return words[0], words[1:], 2 if words[0] == "scripts/train.sh" else int(launcher["ranks"] or 1)


@pytest.mark.parametrize("command", sorted({command for command, _ in commands() if command != "wandb login"}))
def test_a_command_is_accepted(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, args, ranks = program_of(command)
    if "--help" in args:
        with pytest.raises(SystemExit, match="0"):
            parse(args)
    elif program in ("train.py", "scripts/train.sh", "scripts/cluster/multinode.sh"):
        config = parse(args)
        config.validate()
        config.shards(config.training_size(60_000), ranks)
    elif program == "scripts.sweep":
        monkeypatch.setattr(sweep, "run_all", lambda *planned: 0)
        monkeypatch.setattr("signal.signal", lambda *handler: None)
        assert sweep.main([*args, "--out", str(tmp_path)]) == 0
    elif program.startswith("scripts."):
        module = program + ".__main__" * (ROOT / program.replace(".", "/")).is_dir()
        parsed_by(pytest.importorskip(module).main, args, monkeypatch)  # W&B is not installed everywhere
    else:
        assert (ROOT / program).is_file() or program == "loop.parity"


def parsed_by(main: Callable[[list[str]], int], args: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a program read these arguments, and go no further."""
    read = tyro.cli

    def read_and_stop(flags: Any, **settings: Any) -> None:
        read(flags, **settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(tyro, "cli", read_and_stop)
    assert main(args) == 130


@pytest.mark.parametrize(("command", "says"), [pair for pair in dict.fromkeys(commands()) if pair[1]])
def test_a_command_gives_its_numbers_again(
    world: Callable[[int], World], command: str, says: str, tmp_path: Path
) -> None:
    program, args, ranks = program_of(command)
    run = {"train.py": trained, "scripts/train.sh": trained, "scripts.symptoms": symptom}.get(program) or partial(
        distance, program
    )
    numbers, text = world(ranks).run(run, args, tmp_path)[0]
    for part in says.split("; "):
        *name, value = part.split()
        if name[-1:] == ["above"]:  # of a training that blows up, whose digits differ from CPU to CPU
            assert numbers[" ".join(name[:-1])] > float(value)
        elif " ".join(name) in numbers:
            assert float(value) == pytest.approx(numbers[" ".join(name)], rel=2e-3, abs=5e-4)
        elif part.endswith("of the distance travelled"):
            assert float(name[0]) == pytest.approx(numbers["far"], rel=1e-2, abs=1e-12)
        else:
            assert re.search(re.escape(part) + r"(?!\.?\d)", text), text


def trained(args: list[str], out: Path) -> tuple[dict[str, float], str]:
    """Train on this rank as the flags say; return the summary, by the names of the README, and the last sentence."""
    config = parse([*args, "--cpu", "--wandb", "disabled", "--run-name", "run", "--out", str(out)])
    with contextlib.redirect_stdout(io.StringIO()):
        assert train.train(config) == 0
    world_size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    path = out / "run" / "summary.json"
    summary = json.loads(path.read_text()) if path.exists() else {}
    named = {key.replace("/", " ").replace("acc", "accuracy"): value for key, value in summary.items()}
    if config.audit_every and summary:
        last = [row for row in map(json.loads, (out / "run" / "metrics.jsonl").open()) if "audit/grad_scale" in row][-1]
        error = f"{last['audit/grad_rel_err']:.3g}" if last["audit/grad_rel_err"] > 1e-6 else "less than 1e-6"
        text = f"step {last['step']}: {error} of the gradient's length off, cosine {last['audit/grad_cosine']:.2g}"
        return named, text
    return named, last_batch(config, config.shards(config.training_size(60_000), world_size))


def symptom(args: list[str], out: Path) -> tuple[dict[str, float], str]:
    """Show a symptom on this rank, with less patience than its command has."""
    symptoms.SYMPTOMS["uneven-hang"] = lambda fixed: uneven_hang(fixed, patience_s=1)
    text = symptoms.report(args[0], fixed="--fixed" in args)
    return {}, text.replace("waited 1 s", f"waited {PATIENCE_S:g} s")


def distance(recipe: str, args: list[str], out: Path) -> tuple[dict[str, float], str]:
    """Train by a recipe on this rank."""
    module = importlib.import_module(recipe)
    train = module.plain if "--plain" in args else module.train
    return {"far": recipes.distance(train, masked=recipe.endswith("masked_tokens"))}, ""


def test_there_are_commands_with_numbers_to_check() -> None:
    assert len([says for _, says in commands() if says]) >= 20


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", FILES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_within_the_project_lead_to_a_file_and_a_heading(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8"))
    for path, anchor in links:
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


def test_the_front_page_is_short() -> None:
    assert len(README.splitlines()) <= 200


def test_each_symptom_has_a_row_a_check_a_change_and_commands_with_a_wrong_and_a_right_number() -> None:
    says = dict(commands([SYMPTOMS]))
    for name in symptoms.SYMPTOMS:
        wrong = f"torchrun --standalone --nproc_per_node 2 -m scripts.symptoms {name}"
        assert says[wrong]
        assert "2 ranks, fixed: " in says[f"{wrong} --fixed"]
    table, *sections = re.split(r"^### ", SYMPTOMS, flags=re.MULTILINE)
    assert len(re.findall(r"^\| \[", table, re.MULTILINE)) == len(sections)
    for section in sections:
        assert "\n- Check: " in section
        assert "\n- Change: " in section
        assert "# " in "".join(blocks("bash", [section]))


CLASSES, STEPS = 5, 4
IGNORED = -100


def micro_batches(rank: int, count: int, step: int, tokens: bool) -> list[tuple[Tensor, Tensor]]:
    """A rank's micro-batches, of unequal size: rank 1's last is empty, and so is what is left of rank 0's in step 1."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    batches = []
    for k in range(count):
        n = 0 if (rank == 1 and k == count - 1) or (rank == 0 and step == 1) else 1 + (rank + k) % 3
        shape = (n, 6) if tokens else (n,)
        x = torch.randn(*shape, 4, generator=generator, dtype=torch.float64)
        y = torch.randint(CLASSES, shape, generator=generator)
        batches.append((x, y.masked_fill(torch.rand(shape, generator=generator) < 0.4, IGNORED) if tokens else y))
    return batches


def net_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, CLASSES)).to(torch.float64)
    return net, torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)


@contextlib.contextmanager
def copied_reduction(folder: Path) -> Iterator[None]:
    """Let `import reduction` find a copy of reduction.py that lies in a folder alone."""
    folder.mkdir(exist_ok=True)
    shutil.copy(ROOT / "loop" / "reduction.py", folder)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("reduction", None)


def train_step_of(folder: Path) -> Callable[..., Tensor]:
    """Run the block with the whole step; return what it defines."""
    (block,) = (block for block in blocks("python") if "def train_step" in block)
    namespace: dict[str, Any] = {}
    with copied_reduction(folder):
        exec(compile(block, "README.md", "exec"), namespace)
    step: Callable[..., Tensor] = namespace["train_step"]
    return step


def changed_as_shown(folder: Path, sign: str, tokens: bool) -> tuple[Tensor, float]:
    """Run the README's diff before (-) or after (+) the change; return the gradient and the loss to log."""
    lines = blocks("diff", [README])[0].splitlines()
    code = "\n".join(line[1:] for line in lines if line[:1] in (sign, " "))
    logged = re.search(r"The loss to log is `([^`]+)`", README)
    assert logged
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    ((x, y),) = micro_batches(rank, 1, 0, tokens) if rank == 0 else micro_batches(rank, 2, 0, tokens)[:1]
    net = DistributedDataParallel(net_and_optimizer()[0])
    namespace = {"net": lambda x: net(x).flatten(0, -2), "x": x, "y": y.flatten(), "F": F}
    namespace |= {"device": "cpu", "world_size": world_size}
    with copied_reduction(folder / str(os.getpid())):
        exec(compile(code + (f"\nlogged = float({logged[1]})" if sign == "+" else ""), "README.md", "exec"), namespace)
    return flat_gradient(net), namespace.get("logged", 0.0)


@pytest.mark.parametrize("tokens", [False, True])
def test_the_fix_changes_a_mean_of_means_into_one_processs_mean(
    world: Callable[[int], World], tokens: bool, tmp_path: Path
) -> None:
    shares = [micro_batches(0, 1, 0, tokens), micro_batches(1, 2, 0, tokens)[:1]]
    shares = [(x.flatten(0, -2), y.flatten()) for ((x, y),) in shares]

    def gradient(x: Tensor, y: Tensor) -> tuple[Tensor, float]:
        net, _ = net_and_optimizer()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return flat_gradient(net), float(loss.detach())

    want, loss = gradient(torch.cat([x for x, _ in shares]), torch.cat([y for _, y in shares]))
    of_means = sum(gradient(*share)[0] for share in shares) / 2
    for gradient_after, logged in world(2).run(changed_as_shown, tmp_path, "+", tokens):
        assert (gradient_after - want).norm() <= 1e-12 * want.norm()
        assert logged == pytest.approx(loss, rel=1e-12)
    for gradient_before, _ in world(2).run(changed_as_shown, tmp_path, "-", tokens):
        assert (gradient_before - of_means).norm() <= 1e-12 * want.norm()
        assert (gradient_before - want).norm() > 1e-2 * want.norm()


def taken_home(folder: Path, count: int, tokens: bool, accelerated: bool) -> tuple[list[float], Tensor, int]:
    """Train with the README's step on this rank."""
    train_step = train_step_of(folder / str(os.getpid()))
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    net, optimizer = net_and_optimizer()
    backward: dict[str, Any] = {}
    if accelerated:
        accelerator = Accelerator(cpu=True)
        net, optimizer = accelerator.prepare(net, optimizer)
        backward = {"backward": accelerator.backward}
    elif torch.distributed.is_initialized():
        net = DistributedDataParallel(net)
    losses = []
    for step in range(STEPS):
        batches = micro_batches(rank, count, step, tokens)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            losses.append(float(train_step(net, optimizer, batches, "cpu", **backward)))
    collectives = sum(event.count for event in profiler.key_averages() if event.key.startswith("gloo:"))
    # collectives: of the last step, where DDP's buckets are settled
    return losses, flat_weights(net), collectives


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_what_is_taken_home_takes_one_processs_steps(
    world: Callable[[int], World], world_size: int, count: int, tokens: bool, accelerated: bool, tmp_path: Path
) -> None:
    net, optimizer = net_and_optimizer()
    plain = []
    for step in range(STEPS):
        everything = [b for rank in range(world_size) for b in micro_batches(rank, count, step, tokens)]
        x = torch.cat([x.flatten(0, -2) for x, _ in everything])
        y = torch.cat([y.flatten() for _, y in everything])
        if not len(y):
            plain.append(0.0)  # and no step
            continue
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        plain.append(float(loss.detach()))
    want = flat_weights(net)
    for losses, weights, collectives in world(world_size).run(taken_home, tmp_path, count, tokens, accelerated):
        assert (weights - want).norm() <= 1e-12 * want.norm()
        assert losses == pytest.approx(plain, rel=1e-12)
        assert collectives == (3 if world_size > 1 else 0), "n, the gradient and the loss, once each"


def without_a_label(folder: Path) -> float:
    """Take a step in which every label of every rank is masked; return how far AdamW's weight decay moved a weight."""
    net, _ = net_and_optimizer()
    before = flat_weights(net)
    net = DistributedDataParallel(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.5)
    batch = torch.ones(2, 4, dtype=torch.float64), torch.full((2,), IGNORED)
    assert float(train_step_of(folder / str(os.getpid()))(net, optimizer, [batch], "cpu")) == 0
    return float((flat_weights(net) - before).abs().max())


def test_a_step_without_a_label_is_not_taken_on_any_rank(world: Callable[[int], World], tmp_path: Path) -> None:
    assert world(2).run(without_a_label, tmp_path) == [0, 0]


def test_the_loss_of_a_bfloat16_net_is_summed_in_float64(tmp_path: Path) -> None:
    net = nn.Linear(4, CLASSES).to(torch.bfloat16)
    batches = [(x.bfloat16(), y) for k in range(64) for x, y in micro_batches(2, 1, k, tokens=False)]
    losses = [F.cross_entropy(net(x), y, reduction="none").detach().double() for x, y in batches]
    loss = train_step_of(tmp_path / "copy")(net, torch.optim.SGD(net.parameters(), lr=0.1), batches, "cpu")
    assert float(loss) == pytest.approx(float(torch.cat(losses).mean()), rel=1e-12)


def of_a_static_graph(folder: Path, static_graph: bool) -> Tensor:
    """Return the weights after two steps of two micro-batches."""
    net, optimizer = net_and_optimizer()
    net = DistributedDataParallel(net, static_graph=static_graph)
    train_step = train_step_of(folder / str(os.getpid()))
    for step in (0, 2):
        train_step(net, optimizer, micro_batches(torch.distributed.get_rank(), 2, step, tokens=False), "cpu")
    return flat_weights(net)


def test_a_static_graph_takes_the_same_steps(world: Callable[[int], World], tmp_path: Path) -> None:
    for static, plain in zip(*(world(2).run(of_a_static_graph, tmp_path, way) for way in (True, False)), strict=True):
        assert (static - plain).norm() <= 1e-12 * plain.norm()


def audited_as_written(block: str) -> float:
    """Run the README's audit around a loop of three uneven batches on this rank."""
    net, optimizer = net_and_optimizer()
    if torch.distributed.is_initialized():
        net = DistributedDataParallel(net)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    loader = [batch for step in (0, 2) for batch in micro_batches(rank, 2, step, tokens=False)[:1]]
    namespace = {"net": net, "loss": nn.CrossEntropyLoss(), "optimizer": optimizer, "loader": loader}
    exec(compile(block, "README.md", "exec"), namespace)
    assert len(namespace["a"].readings) == 2
    return namespace["worst"].grad_rel_err


def test_the_audit_runs_as_written_and_finds_the_mean_of_means(world: Callable[[int], World]) -> None:
    (block,) = (block for block in blocks("python") if "audit(" in block)
    assert world(1).run(audited_as_written, block)[0] < 1e-12
    assert world(2).run(audited_as_written, block)[0] > 1e-2  # of 1 and 2 examples


@pytest.mark.parametrize(("norm", "exact"), [(nn.BatchNorm1d, False), (nn.LayerNorm, True)])
def test_global_leaves_batch_norm_to_its_cells(norm: Callable[[int], nn.Module], exact: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 4, generator=generator), torch.randint(CLASSES, (8,), generator=generator)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 7), norm(7), nn.Linear(7, CLASSES)).double()
    F.cross_entropy(net(x.double()), y).backward()
    want = flat_gradient(net)
    net.zero_grad()
    for cell in (slice(5), slice(5, 8)):
        losses = F.cross_entropy(net(x[cell].double()), y[cell], reduction="none")
        cell_loss(losses, n_global=8, averaged_over=1).backward()
    error = (flat_gradient(net) - want).norm() / want.norm()
    assert error < 1e-12 if exact else error > 1e-2


def test_batch_norm_refuses_a_cell_of_one() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        nn.BatchNorm1d(3)(torch.randn(1, 3))


@pytest.mark.parametrize("times", [1, 256])
def test_adams_epsilon_is_smaller_beside_a_sum(times: int) -> None:
    weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
    weight.grad = times * torch.tensor(1e-8, dtype=torch.float64)
    torch.optim.Adam([weight], lr=1.0, eps=1e-8).step()
    assert float(weight.detach()) == pytest.approx(-times / (times + 1), rel=1e-9)
