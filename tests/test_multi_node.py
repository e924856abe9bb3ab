"""Two nodes of two processes with addresses of their own run the DeepSpeed recipe, on the CPU."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")
pytest.importorskip("bitsandbytes")

from tests.test_recipes import ALPACA, TEXT, require_whole_run, tiny_folder

pytestmark = pytest.mark.slow
LIMIT = 540
"""Seconds for a job of four processes on a loaded machine with two cores."""


def as_root(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.fixture
def nodes() -> Iterator[list[tuple[list[str], str, dict[str, str]]]]:
    """For each node a prefix of its commands, its address, and its variables.

    Network namespaces joined by a pair of virtual cables where the test may make them, else two loopback addresses.
    """
    names = [f"lowrank{os.getpid()}{letter}" for letter in "ab"]
    addresses, cables = ["10.213.7.1", "10.213.7.2"], [f"lr{os.getpid() % 10**6}{letter}" for letter in "ab"]
    made = (
        os.geteuid() == 0
        and shutil.which("ip") is not None
        and all(as_root("ip", "netns", "add", name) for name in names)
        and as_root("ip", "link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
    )
    for name, cable, address in zip(names, cables, addresses, strict=True):
        inside = ("ip", "netns", "exec", name, "ip")
        made = (
            made
            and as_root("ip", "link", "set", cable, "netns", name)
            and as_root(*inside, "addr", "add", f"{address}/24", "dev", cable)
            and as_root(*inside, "link", "set", cable, "up")
            and as_root(*inside, "link", "set", "lo", "up")
        )
    try:
        if made:
            yield [
                (["ip", "netns", "exec", name], address, {"GLOO_SOCKET_IFNAME": cable})
                for name, address, cable in zip(names, addresses, cables, strict=True)
            ]
        else:
            yield [([], address, {"GLOO_SOCKET_IFNAME": "lo"}) for address in ("127.0.0.2", "127.0.0.3")]
    finally:
        for name in names:
            as_root("ip", "netns", "del", name)
        as_root("ip", "link", "del", cables[0])


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("", 0))
        return int(opened.getsockname()[1])


def command(folder: Path, *options: str) -> list[str]:
    sources = [f"--data.sources.{split}=text.txt" for split in ("calibration", "test")]
    return [
        *(
            "run",
            "llama7b_40pct_deepspeed",
            "--trainer.num_nodes=2",
            "--trainer.devices=2",
            "--trainer.accelerator=cpu",
        ),
        *("--data.sources.train=alpaca:alpaca.json", *sources, "--model.model=./tiny", "--data.tokenizer=./tiny"),
        *("--data.block_size=256", "--data.calibration_blocks=8", "--data.evaluation_blocks=4"),
        *("--LowRankCompression.min_rank=64", "--model.optimizer=adamw", "--trainer.enable_progress_bar=false"),
        *("--trainer.strategy.init_args.timeout=120", "--trainer.max_steps=2", *options),
    ]


def prepare(folder: Path) -> object:
    (folder / "text.txt").write_text(TEXT)
    (folder / "alpaca.json").write_text(json.dumps(ALPACA))
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_hidden_layers": 2}
    return tiny_folder("llama", folder / "tiny", **sizes)


def run(
    folder: Path, nodes: list[tuple[list[str], str, dict[str, str]]], commands: list[list[str]]
) -> list[tuple[int, str]]:
    """Start a command on each node and wait; exit status and what was printed, of each."""
    started, root = [], str(Path(__file__).parents[1])
    for number, ((prefix, _, variables), argv) in enumerate(zip(nodes, commands, strict=True)):
        environment = os.environ | variables | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}
        environment |= {"MASTER_ADDR": nodes[0][1], "NODE_RANK": str(number)}
        log = (folder / f"node{number}.log").open("w")
        started.append(
            subprocess.Popen([*prefix, *argv], cwd=folder, env=environment, stdout=log, stderr=log, text=True)
        )
    limit = time.monotonic() + LIMIT
    try:
        ended = [process.wait(max(1.0, limit - time.monotonic())) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(status, (folder / f"node{number}.log").read_text()) for number, status in enumerate(ended)]


def test_two_nodes_by_torchrun(tmp_path: Path, nodes: list[tuple[list[str], str, dict[str, str]]]) -> None:
    dense, port = prepare(tmp_path), free_port()
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2"]
    launch += [f"--master-addr={nodes[0][1]}", f"--master-port={port}"]
    work = ["-m", "lowrank_lit", *command(tmp_path)]
    for status, printed in run(tmp_path, nodes, [[*launch, f"--node-rank={n}", *work] for n in range(2)]):
        assert status == 0, printed[-4000:]
    root = tmp_path / "runs/llama7b_40pct_deepspeed"
    assert len(list((root / "checkpoints/last.ckpt/checkpoint").glob("*optim_states.pt"))) == 4
    require_whole_run(root, dense, 0.6, 64 * 1024)


@pytest.mark.parametrize("node", [0, 1], ids=["no other node comes", "the first one is not there"])
def test_a_node_that_cannot_be_reached(
    tmp_path: Path, nodes: list[tuple[list[str], str, dict[str, str]]], node: int
) -> None:
    """One line with the address, once the time is over."""
    prepare(tmp_path)
    options = ("--trainer.strategy.init_args.timeout=10", "--trainer.devices=1")
    argv = [sys.executable, "-m", "lowrank_lit", *command(tmp_path, *options)]
    prefix, own, variables = nodes[node]
    address, port = own if node == 0 else "10.213.7.9" if prefix else "127.0.0.9", free_port()
    environment = os.environ | variables | {"MASTER_ADDR": address, "MASTER_PORT": str(port), "NODE_RANK": str(node)}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [*prefix, *argv], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert line.startswith(f"error: the processes of the job did not find each other at {address}:{port} in ")
    assert "LowRankDeepSpeed.timeout=10 seconds" in line
    assert "set MASTER_ADDR and MASTER_PORT" in line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()
