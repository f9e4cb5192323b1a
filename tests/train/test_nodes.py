"""Several machines: two hosts in network namespaces of their own train together, without ssh."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
import typer
import yaml
from conftest import ROOT, settings

from tinyllama.cli.app import build
from tinyllama.errors import ConfigError
from train import nodes


@pytest.fixture
def hosts() -> Iterator[list[list[str]]]:
    """The commands that enter two hosts, 10.77.0.1 and 10.77.0.2, joined by a cable."""
    names = [f"tinyllama-{os.getpid()}-{number}" for number in (0, 1)]

    def ip(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)

    try:
        made = [ip("netns", "add", name) for name in names]
    except FileNotFoundError:
        pytest.skip("iproute2 is not installed")
    if reason := next((done.stderr.strip() for done in made if done.returncode), None):
        pytest.skip(f"network namespaces: {reason}")
    try:
        cable = [f"tl{os.getpid() % 10**6}{end}" for end in "ab"]
        made = [ip("link", "add", cable[0], "netns", names[0], "type", "veth", "peer", cable[1], "netns", names[1])]
        for number, name in enumerate(names):
            made.append(ip("-n", name, "address", "add", f"10.77.0.{number + 1}/24", "dev", cable[number]))
            made += [ip("-n", name, "link", "set", device, "up") for device in (cable[number], "lo")]
        assert not any(done.returncode for done in made), [done.stderr for done in made]
        yield [
            ["ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME={cable[number]}"]
            for number, name in enumerate(names)
        ]
    finally:
        for name in names:
            ip("netns", "delete", name)


def test_two_hosts_train_together_as_two_ranks_of_one(hosts, finished_run, stores, tmp_path):
    run = tmp_path / "run"
    arguments = ["train", "--recipe", "demo", "--data", str(stores), "--output", str(run), "--num-accelerators", "1"]
    arguments += ["--nodes", "2", "--master", "10.77.0.1:29533", *settings("training.tokens=6912")]
    started = []
    for rank, enter in enumerate(hosts):
        command = [*enter, sys.executable, "-m", "tinyllama", *arguments, "--node-rank", str(rank)]
        started.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    outputs = [process.communicate(timeout=240)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(outputs)
    assert "parameters" in outputs[0]
    assert "parameters" not in outputs[1]  # one machine speaks

    def losses(folder):
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return [line["loss"] for line in lines if "loss" in line]

    # Between machines gradients are summed by gloo, on one by DeepSpeed in shared memory: the order may differ.
    assert losses(run) == pytest.approx(losses(finished_run), rel=2e-3)


def test_slurm_says_where_this_node_stands(tmp_path, monkeypatch):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[3-4]" ] && printf "n3\\nn4\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    step = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NODEID": "1", "SLURM_JOB_ID": "40007"}
    step["SLURM_STEP_NODELIST"] = "n[3-4]"
    assert nodes.from_slurm(step, 8) == nodes.Nodes(2, 1, "n3", 20007, 8)
    assert nodes.from_slurm(step, 8).ranks == 16
    assert nodes.from_slurm({**step, "SLURM_STEP_NUM_NODES": "1"}, 8) is None
    assert nodes.from_slurm({}, 8) is None
    with pytest.raises(ConfigError, match="--ntasks-per-node=1"):
        nodes.from_slurm({**step, "SLURM_STEP_NUM_TASKS": "16"}, 8)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((2, None, "a:1"), "--node-rank None"),
        ((2, 2, "a:1"), "--node-rank 2"),
        ((0, 0, "a:1"), "--nodes 0"),
        ((2, 0, None), "--master None"),
        ((2, 0, "a"), "--master a"),
        ((2, 0, "a:http"), "--master a:http"),
        ((2, 0, "a:70000"), "--master a:70000"),
    ],
)
def test_impossible_machines_are_refused(arguments, words):
    with pytest.raises(ConfigError, match=words):
        nodes.given(*arguments, accelerators=8)


def test_documented_jobs_are_yaml_and_name_real_options():
    text = (ROOT / "docs" / "multinode.md").read_text()
    jobs = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)]
    assert [job["kind"] for job in jobs] == ["PyTorchJob", "MPIJob"]
    assert jobs[0]["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    commands = re.findall(r"tinyllama train[^\n`]*(?:\n +--[^\n`]*)*", text)
    assert len(commands) >= 6
    command = typer.main.get_command(build())
    train = command.commands["train"]
    known = {name for parameter in train.params for name in parameter.opts}
    for found in commands:
        assert set(re.findall(r"--[a-z][a-z-]*", found)) <= known, found
