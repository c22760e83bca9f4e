"""A command whose flags cannot be followed says so in one line, and ends with exit code 2."""

from __future__ import annotations

import os
from importlib import import_module
from unittest import mock

import pytest
import torch

from scripts.gallery.__main__ import NEEDS
from scripts.peers.__main__ import PEERS
from scripts.symptoms.__main__ import SYMPTOMS

REFUSED = {
    "scripts.bench.__main__": {
        "--rounds 0": "--rounds must be at least 1",
        "--pairs 4": "--pairs must be at least 5",
        "--world-sizes 3": "--world-sizes must divide the batch of 256: all loops take the same",
        "--examples 60001": "--examples 60001: there are 60000",
        "--json no/such/folder.json": "--json no/such/folder.json: not a file in a folder that there is",
        "--device cuda --world-sizes 64 --parts loops": (
            f"--device cuda with 64 rank(s): {torch.cuda.device_count()} GPU(s) here"
        ),
    },
    "scripts.diagnose": {
        "--loss 1 0": "--loss: the second value is 0, and has no quotient",
        "--loss 2 1 --ranks 0 1": "--ranks 0 1: must be at least 1",
    },
    "scripts.explain": {
        "--world-size 0": "world_size must be at least 1, got 0",
        "--batch-size 0": "batch_size must be at least 1, got 0",
        "--lr 0": "--lr 0 must be a finite number above 0",
        "--lr nan": "--lr nan must be a finite number above 0",
        "--png .": "[Errno 21] Is a directory: '.'",
        "--html .": "[Errno 21] Is a directory: '.'",
        "--html page.html --world-size 65": "--world-size 65: the page of --html shows at most 64",
    },
    "scripts.gallery.__main__": {
        "--only nonsense": f"--only nonsense: there is no such figure or block; choose from: {', '.join(NEEDS)}",
    },
    "scripts.peers.__main__": {
        "--examples 0": "--examples 0: must be at least 1",
        "--examples 60001": "--examples 60001: there are only 60000",
        "--world-size 1": "--world-size 1: one rank has no one to differ from",
        "--timeout 0": "--timeout 0: must lie between 0 and 120",
        "--only Horovod": f"--only Horovod: no such peer; there are: {'; '.join(PEERS)}",
        "--json .": "[Errno 21] Is a directory: '.'",
        "--examples 0 --timeout 0": "--examples 0: must be at least 1",
        "--json /no/such/folder/p.json": "[Errno 2] No such file or directory: '/no/such/folder/p.json'",
    },
    "scripts.symptoms.__main__": {
        "hang": f"there is no hang: choose from {', '.join(SYMPTOMS)}",
        "uneven-hang": "needs ranks: torchrun --standalone --nproc_per_node 2 -m scripts.symptoms uneven-hang",
    },
}


@pytest.mark.parametrize(("module", "flags"), [(module, flags) for module, rows in REFUSED.items() for flags in rows])
def test_bad_flags_get_one_line(module: str, flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.dict(os.environ):  # some set variables for what they would start
        assert import_module(module).main(flags.split()) == 2
    name = module.removesuffix(".__main__")
    assert capsys.readouterr().err == f"{name}: error: {REFUSED[module][flags]}\n"
