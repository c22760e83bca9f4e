"""The files made to be copied: each works in an empty folder as its docstring shows, with torch and nothing else."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from pathlib import Path

import pytest

from loop import virtual_ranks
from tests.forks import Forked
from tests.launches import environment

LOOP = Path(__file__).parent.parent / "loop"
SETTING = """
import torch
net, loss = torch.nn.Linear(3, 2), torch.nn.CrossEntropyLoss()
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
x, y = torch.ones(16, 3), torch.arange(16) % 2
"""
of_virtual_ranks = inspect.cleandoc(virtual_ranks.__doc__ or "")
LOOP_OF_VIRTUAL_RANKS = textwrap.dedent(
    of_virtual_ranks[of_virtual_ranks.index("    shares =") : of_virtual_ranks.index("A net under Distributed")]
)
PROGRAMS = {
    "virtual_ranks": f"""
import copy
from torch.nn.functional import cross_entropy
from virtual_ranks import VirtualRanks
plain, rank, world_size, order = copy.deepcopy(net), 0, 1, torch.arange(300)
x, y = torch.randn(300, 3), order % 2
{LOOP_OF_VIRTUAL_RANKS}
for batch in order.split(256):
    plain.zero_grad()
    cross_entropy(plain(x[batch]), y[batch]).backward()
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
assert (net.weight - plain.weight).norm() < 1e-6
""",
    "reduction": """
from reduction import cell_backward, global_count
n = global_count(len(y), "cpu")
cell_backward(torch.nn.functional.cross_entropy(net(x), y, reduction="none"), n_global=n, averaged_over=1)
got = net.weight.grad.clone()
net.zero_grad()
loss(net(x), y).backward()
assert torch.allclose(got, net.weight.grad)
net.zero_grad()
""",
    "audit": """
from audit import audit
with audit(net, loss, optimizer) as a:
    a.saw(x, y)
    loss(net(x), y).backward()
    optimizer.step()
assert a.worst().grad_rel_err < 1e-6
""",
    "parity": """
from parity import parity
from mine import right, wrong
if __name__ == "__main__":
    assert parity(right, data=(x, y), batch_size=16).same
    report = parity(wrong, data=(x, y), batch_size=16, world_sizes=[3])
    assert report.causes == {3: ["the gradient is 1/W of the right one: divided by W twice"]}, report
""",
}
MINE = """
import os
import torch
import torch.distributed as dist
def train(batches, factor):
    torch.manual_seed(0)
    net, world_size = torch.nn.Linear(3, 2).double(), 1
    if int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("gloo")
        net = torch.nn.parallel.DistributedDataParallel(net)
        world_size = dist.get_world_size()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in batches:
        optimizer.zero_grad()
        for x, y in step:
            losses = torch.nn.functional.cross_entropy(net(x.double()), y, reduction="sum")
            (losses / 16 * (world_size if factor else 1)).backward()
        optimizer.step()
    return net
def right(batches):
    return train(batches, True)
def wrong(batches):
    return train(batches, False)
"""


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_file_that_was_copied_works_where_it_lies(name: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / f"{name}.py").write_bytes((LOOP / f"{name}.py").read_bytes())
    (tmp_path / "program.py").write_text(SETTING + PROGRAMS[name])
    done = Forked([sys.executable, str(tmp_path / "program.py")], environment())
    assert done.communicate(timeout=100)[1] == ""
    assert done.returncode == 0


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_file_to_copy_imports_torch_alone(name: str) -> None:
    """Anywhere in it, in a function too."""
    imported = set()
    for node in ast.walk(ast.parse((LOOP / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add("." * node.level + (node.module or "").partition(".")[0])
    assert imported - sys.stdlib_module_names == {"torch"}
