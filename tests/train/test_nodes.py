"""Several machines: two hosts in network namespaces of their own train together, without ssh."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml
from conftest import ROOT, members, settings, until

from tinyllama import checkpoint
from tinyllama.cli.app import build
from tinyllama.errors import ConfigError
from train import heartbeat, nodes, pretrain
from train.launch import free_port


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


@pytest.mark.slow
def test_a_machine_that_is_gone_ends_the_other_with_76_and_one_line(hosts, stores, tmp_path):
    run = tmp_path / "run"
    arguments = ["train", "--recipe", "demo", "--data", str(stores), "--output", str(run), "--num-accelerators", "1"]
    arguments += ["--nodes", "2", "--master", "10.77.0.1:29534", *settings("training.tokens=6912")]
    arguments += ["--inject", "hold=forward@4"]
    started = []
    for rank, enter in enumerate(hosts):
        named = ["unshare", "--uts", "sh", "-c", f'hostname host-{rank} && exec "$@"', "sh"]
        command = [*enter, *named, sys.executable, "-m", "tinyllama", *arguments, "--node-rank", str(rank)]
        environment = {**os.environ, "HERE": f"{run}-{rank}", "COLUMNS": "200"}
        started.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    held = [run / "held-0", run / "held-1"]
    assert until(lambda: all(map(Path.exists, held)) or any(p.poll() is not None for p in started), 240)
    assert until(lambda: [step for step, _ in checkpoint.list_checkpoints(run)] == [3])  # written in the background
    for pid in members(f"HERE={run}-1"):
        os.kill(pid, signal.SIGKILL)
    (run / "go-on").touch()
    said, _ = started[0].communicate(timeout=120)
    assert started[0].returncode == 76, said
    assert "Traceback" not in said
    assert len([line for line in said.splitlines() if "error:" in line]) == 1, said
    assert "a rank is gone, here or on another machine" in said
    started[1].communicate(timeout=30)
    assert checkpoint.list_checkpoints(run)[-1][0] == 3


GLOO = """
import os, sys, torch, torch.distributed as dist
from train.pretrain import is_lost_connection
dist.init_process_group("gloo", rank=int(sys.argv[1]), world_size=2, init_method="tcp://127.0.0.1:" + sys.argv[2])
dist.barrier()
if sys.argv[1] == "1":
    os._exit(0)
try:
    for _ in range(100):
        dist.all_reduce(torch.ones(1))
except RuntimeError as error:
    print(is_lost_connection(error), error, flush=True)
    print(is_lost_connection(RuntimeError("shape '[2, 3]' is invalid for input of size 5")), flush=True)
    os._exit(0)
"""


def test_what_gloo_says_of_a_rank_that_is_gone_is_known():
    command, port = [sys.executable, "-c", GLOO], str(free_port())
    other = subprocess.Popen([*command, "1", port], cwd=ROOT, stderr=subprocess.DEVNULL)
    first = subprocess.run([*command, "0", port], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    other.wait(60)
    assert first.stdout.startswith("True"), first.stdout + first.stderr
    assert first.stdout.endswith("False\n")


def test_a_rank_without_the_others_ends_for_their_reason_or_with_76(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(heartbeat, "GRACE_S", 0.1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    beat, other = heartbeat.Heartbeat(tmp_path, 0), heartbeat.Heartbeat(tmp_path, 1)
    beat.start("this run")
    other.start("a run before")
    other.end(2)
    error = RuntimeError("[pair.cc:547] Connection closed by peer [10.0.0.2]:4711")
    assert pretrain.is_lost_connection(error)
    assert pretrain.without_a_peer(error, beat) == 76
    said = capsys.readouterr().err
    assert said.startswith("error: a rank is gone, here or on another machine ([pair.cc:547] Connection closed")
    assert said.count("error:") == 1
    assert "Connection closed by peer" in heartbeat.stack_file(tmp_path, 0).read_text()
    other.start("this run")
    other.end(75)
    assert pretrain.without_a_peer(error, beat) == 75
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert pretrain.without_a_peer(error, beat) is None


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
