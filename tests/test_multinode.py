"""Training over several machines: two network namespaces stand in for hosts, and a few scripts for Slurm's commands."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from loop.config import InputError
from scripts.cluster import interface
from tests.cases import relative_distance
from tests.hosts import ADDRESSES, NAMES, NoHostsError, TwoHosts
from tests.launches import LAUNCHES, kill, launch, rows_of, start, wait_for_rows

MULTINODE = ["bash", "scripts/cluster/multinode.sh"]
SLICE = ["--dtype", "float64", "--epochs", "20", "--train-examples", "1003", "--batch-size", "128"]
DDP_TIMEOUT_S, NOTICED_S = 5, 10
MEETINGS: dict[str, list[dict[str, str]]] = {  # one host's variables, and the other's
    "static": [{"NODE_RANK": rank, "MASTER_ADDR": ADDRESSES[0]} for rank in "01"],
    "c10d": [{"RDZV_ENDPOINT": f"{ADDRESSES[0]}:29500", "RDZV_ID": "test"}] * 2,
}


@pytest.fixture(scope="module")
def hosts() -> Iterator[TwoHosts]:
    try:
        with TwoHosts() as hosts:
            yield hosts
    except NoHostsError as reason:
        pytest.skip(f"no two hosts made of network namespaces: {reason}")


@pytest.fixture(scope="module")
def meeting_statically(hosts: TwoHosts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run over both hosts, a rank on each."""
    out = tmp_path_factory.mktemp("runs")
    for code, said in results(start_on_both(hosts, "static", out, "--run-name", "static"), 120):
        assert code == 0, said
    return out / "static"


def start_on_both(hosts: TwoHosts, meeting: str, out: Path, *flags: str, **environ: str) -> list[subprocess.Popen[str]]:
    return [
        start([*enter, *MULTINODE], out, *SLICE, *flags, NNODES="2", NPROC="1", **each, **environ)
        for enter, each in zip(hosts.enter, MEETINGS[meeting], strict=True)
    ]


def results(nodes: list[subprocess.Popen[str]], timeout_s: float) -> list[tuple[int, str]]:
    """Each node's exit code and stderr; the nodes are gone."""
    try:
        return [(node.wait(timeout_s), node.communicate()[1]) for node in nodes]
    finally:
        for node in nodes:
            if node.poll() is None:
                kill(node)


@pytest.mark.slow  # 20 s
def test_two_hosts_come_to_the_weights_of_one_process(meeting_statically: Path, tmp_path: Path) -> None:
    done = launch(LAUNCHES["python"], tmp_path, *SLICE, "--run-name", "plain")
    assert done.returncode == 0, done.stderr
    weights, plain = (load_file(run / "model.safetensors") for run in (meeting_statically, tmp_path / "plain"))
    assert relative_distance(weights, plain) < 1e-12
    assert len(json.loads((meeting_statically / "config.json").read_text())["devices"]) == 2


@pytest.mark.slow  # 36 s
def test_a_host_cut_off_for_a_while_costs_a_restart_and_not_a_digit(
    hosts: TwoHosts, meeting_statically: Path, tmp_path: Path
) -> None:
    flags = ["--run-name", "cut", "--checkpoint-every", "5", "--ddp-timeout", str(DDP_TIMEOUT_S)]
    nodes = start_on_both(hosts, "c10d", tmp_path, *flags, MAX_RESTARTS="5", JOIN_S="60")
    wait_for_rows(nodes[0], tmp_path, 4)
    hosts.cable("down")
    cut = time.monotonic()
    assert nodes[0].stderr
    said = next((line for line in nodes[0].stderr if "train.py: error" in line), "nothing")
    noticed_s = time.monotonic() - cut
    hosts.cable("up")
    for code, rest in results(nodes, 120):
        assert code == 0, rest
    assert "rank 1 is dead, stopped, or cut off" in said
    assert noticed_s < DDP_TIMEOUT_S + NOTICED_S
    weights, uncut = (load_file(run / "model.safetensors") for run in (tmp_path / "cut", meeting_statically))
    assert all(weights[name].equal(uncut[name]) for name in uncut)
    assert rows_of(tmp_path / "cut") == rows_of(meeting_statically)


def refusal(*flags: str, **environ: str) -> str:
    """The last line that multinode.sh says, having refused."""
    done = subprocess.run(
        [*MULTINODE, *flags],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], "VIRTUAL_ENV": sys.prefix, "NPROC": "1", **environ},
        timeout=60,
    )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("environ", "complaint"),
    [
        ("", "how many machines? NNODES=2"),
        ("NNODES=two", "NNODES=two is not a number"),
        ("NNODES=0", "NNODES=0: must be at least 1"),
        ("NNODES=2 NODE_RANK=0", "where do the nodes meet? MASTER_ADDR=HOST"),
        ("NNODES=2 MASTER_ADDR=h", "which node is this? NODE_RANK=0 on h, then 1 to 1"),
        ("NNODES=2 MASTER_ADDR=h NODE_RANK=2", "NODE_RANK=2 must be below NNODES=2"),
        ("NNODES=2 RDZV_ENDPOINT=h:1", "RDZV_ENDPOINT needs RDZV_ID"),
        ("NNODES=2 RDZV_ENDPOINT=h:1 RDZV_ID=1 NODE_RANK=0", "not both"),
        ("NNODES=2 MASTER_ADDR=h NODE_RANK=0 MAX_RESTARTS=1", "MAX_RESTARTS=1 needs RDZV_ENDPOINT and RDZV_ID"),
        ("NNODES=2 RDZV_ENDPOINT=h:1 RDZV_ID=1 MAX_RESTARTS=1", "MAX_RESTARTS=1 needs --run-name"),
    ],
)
def test_variables_that_make_no_sense_are_refused_in_a_line(environ: str, complaint: str) -> None:
    variables = dict(pair.split("=") for pair in environ.split())
    assert complaint in refusal("--run-names", "plural", **variables)


def test_bad_flags_stop_a_node_before_it_waits_for_others() -> None:
    said = refusal("--tail", "pad", "--batch-size", "33", NNODES="2", NODE_RANK="0", MASTER_ADDR="127.0.0.1", NPROC="2")
    assert said.startswith("train.py: error: --tail pad needs ranks x micro-batches (4 x 1 = 4)")


def test_an_address_where_nobody_answers_ends_a_node_with_a_message(hosts: TwoHosts) -> None:
    module = [sys.executable, "-m", "scripts.cluster.interface", f"{ADDRESSES[0]}:29499", "--wait", "1"]
    done = subprocess.run([*hosts.enter[1], *module], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "nobody answers at 10.77.0.1:29499 after 1 s" in done.stderr


def test_a_host_finds_the_interface_on_the_way(hosts: TwoHosts) -> None:
    for enter, address, part in zip(hosts.enter, ADDRESSES, ["host", "guest"], strict=True):
        module = [sys.executable, "-m", "scripts.cluster.interface", f"{ADDRESSES[0]}:29500"]
        assert subprocess.check_output([*enter, *module], text=True) == f"{address} cable {part}\n"


def test_a_name_that_means_loopback_here_is_no_meeting_point(monkeypatch: pytest.MonkeyPatch) -> None:
    loopback = [(socket.AF_INET, socket.SOCK_DGRAM, 0, "", ("127.0.1.1", 29500))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: loopback)
    with pytest.raises(InputError, match=r"this-node is 127\.0\.\d\.1 on this node, where no other node finds it"):
        interface.reach("this-node", 29500, None)


def test_an_interface_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(InputError, match=r"IFNAME=ib7: there is no such interface with an address: .*lo"):
        interface.reach("127.0.0.1", 29500, "ib7")


@pytest.mark.parametrize("endpoint", ["host", "host:", ":29500", "host:port", "host:0", "host:65536"])
def test_an_endpoint_is_a_host_and_a_port(endpoint: str) -> None:
    with pytest.raises(InputError, match="is not HOST:PORT"):
        interface.split_endpoint(endpoint)
    assert interface.split_endpoint("host:29500") == ("host", 29500)


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a batch script, whose commands note in `calls` how they were called; srun takes STEP_S."""
    commands = {
        "scontrol": f'[ "$1" != show ] || printf "%s\\n" {" ".join(NAMES)}',
        "scancel": f'kill "$(cat {tmp_path}/step)"',
        "srun": f'env >{tmp_path}/env; echo $$ >{tmp_path}/step; exec sleep "$STEP_S"',
    }
    for name, does in commands.items():
        path = tmp_path / name
        path.write_text(f'#!/bin/sh\necho {name} "$@" >>{tmp_path}/calls\n{does}\n')
        path.chmod(0o755)
    return {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_SUBMIT_DIR": str(Path.cwd()),
        "STEP_S": "0",
    }


def test_a_slurm_job_runs_multinode_on_every_node(slurm: dict[str, str], tmp_path: Path) -> None:
    subprocess.run(["bash", "scripts/cluster/slurm.sbatch", "--net", "lenet"], env=slurm, check=True, timeout=30)
    srun = (
        "srun --kill-on-bad-exit=1 bash scripts/cluster/multinode.sh --net lenet --run-name slurm-123456 --resume auto"
    )
    assert (tmp_path / "calls").read_text().splitlines() == ["scontrol show hostnames node[1-2]", srun]
    environ = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines())
    assert environ["RDZV_ENDPOINT"] == f"{NAMES[0]}:23456"
    assert (environ["NNODES"], environ["RDZV_ID"], environ["MAX_RESTARTS"]) == ("2", "123456-0", "3")


def test_a_slurm_job_whose_time_is_up_stops_its_ranks_and_queues_again(slurm: dict[str, str], tmp_path: Path) -> None:
    command = ["bash", "scripts/cluster/slurm.sbatch", "--run-name", "long", "--resume=never"]
    job = subprocess.Popen(command, env={**slurm, "STEP_S": "30"})
    while not (tmp_path / "step").exists():
        assert job.poll() is None
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == 128 + signal.SIGTERM, "the step's own end"
    assert (tmp_path / "calls").read_text().splitlines()[1:] == [
        "srun --kill-on-bad-exit=1 bash scripts/cluster/multinode.sh --run-name long --resume=never",
        "scancel --signal=TERM 123456",
        "scontrol requeue 123456",
    ]
