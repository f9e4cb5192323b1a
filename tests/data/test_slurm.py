"""On a real Slurm: data preparation as job arrays, and docs/data.md's training job, warned by Slurm and queued again."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm_cluster
from conftest import ROOT, content, preparing, settings, tinyllama, until

from tinyllama.data.prepare import prepare
from tinyllama.data.store import verify
from tinyllama.tokenizer.sentencepiece_model import Tokenizer


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    if reason := slurm_cluster.missing():
        pytest.skip(reason)
    with slurm_cluster.cluster(tmp_path_factory.mktemp("slurm")) as environment:
        yield environment


def test_four_job_arrays_write_the_bytes_of_one_machine(slurm, corpus, tokenizer_model, tmp_path):
    prepare([corpus], tmp_path / "here", Tokenizer.load(tokenizer_model), shard_tokens=30_000, workers=0)
    arguments = preparing(corpus, tmp_path / "store", tokenizer_model)
    arguments += ["--shard-tokens", "30000", "--executor", "slurm", "--partition", "batch", "--tasks", "2"]
    done = tinyllama(*arguments, "--json", env=slurm)
    assert len(json.loads(done.stdout)["slurm_jobs"]) == 4
    slurm_cluster.wait_for_jobs(slurm)
    verify(tmp_path / "store")
    assert content(tmp_path / "store") == content(tmp_path / "here")
    assert not (tmp_path / "store.partial").exists()


def test_a_failed_job_leaves_no_store_and_the_same_command_goes_on(slurm, tokenizer_model, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": \n')
    arguments = preparing(tmp_path / "a.jsonl", tmp_path / "store", tokenizer_model)
    arguments += ["--executor", "slurm", "--partition", "batch", "--validation-fraction", "0"]
    tinyllama(*arguments, env=slurm)
    slurm_cluster.wait_for_jobs(slurm)  # the stages after the failed one go from the queue
    assert not (tmp_path / "store").exists()
    logs = "".join(
        path.read_text() for path in (tmp_path / "store.logs").rglob("*") if path.is_file() and path.suffix == ".log"
    )
    assert "a.jsonl:2 is not valid JSON" in logs
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": "now"}\n')
    tinyllama(*arguments, env=slurm)
    slurm_cluster.wait_for_jobs(slurm)
    assert verify(tmp_path / "store").documents("train") == 2


def test_a_second_command_while_jobs_are_queued_is_refused(slurm, tokenizer_model, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n')
    arguments = preparing(tmp_path / "a.jsonl", tmp_path / "store", tokenizer_model)
    arguments += ["--validation-fraction", "0"]
    queued = [*arguments, "--executor", "slurm", "--partition", "batch", "--json"]
    jobs = json.loads(tinyllama(*queued, "--sbatch", "begin=now+1hour", env=slurm).stdout)["slurm_jobs"]
    for command in (queued, arguments):
        done = tinyllama(*command, env=slurm, check=False)
        assert done.returncode == 2
        assert f"Slurm jobs {', '.join(jobs)} are writing" in done.stderr
        assert "Traceback" not in done.stderr
    subprocess.run(["scancel", *jobs], env=slurm_environment(slurm), check=True)
    slurm_cluster.wait_for_jobs(slurm)
    tinyllama(*arguments, env=slurm)
    assert verify(tmp_path / "store").documents("train") == 1

    done = tinyllama(*queued, "--overwrite", "--sbatch", "time=soon", env=slurm, check=False)
    assert done.returncode == 2
    assert "sbatch refused the stage tokenize" in done.stderr
    assert "Traceback" not in done.stderr


def slurm_environment(slurm: dict[str, str]) -> dict[str, str]:
    return {**os.environ, **slurm}


def test_the_documented_training_job_saves_when_warned_and_continues(slurm, stores, tmp_path):
    """The script of docs/data.md, but for the GPUs and the recipe."""
    text = (ROOT / "docs" / "data.md").read_text()
    script = next(block for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL) if "requeue" in block)
    script = script.replace("#SBATCH --gpus-per-node=8\n", "#SBATCH --partition=batch\n")
    more = " ".join(settings("training.tokens=61440", "checkpoint.every_steps=1000"))
    command = f"tinyllama train --recipe demo --data {stores} --output {tmp_path / 'run'} --num-accelerators 2 {more} "
    command += "--inject hold=forward@5 &"  # until the signal has reached the ranks
    script, count = re.subn(r"tinyllama train .* &", command.replace("\\", r"\\"), script)
    assert count == 1
    (tmp_path / "train.slurm").write_text(script)
    environment = slurm_environment(slurm)
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(
        ["sbatch", "--parsable", "--output", str(tmp_path / "out.txt"), str(tmp_path / "train.slurm")],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    held = [tmp_path / "run" / f"held-{rank}" for rank in (0, 1)]
    # DeepSpeed compiles, if this is the first run of an environment.
    assert until(lambda: all(map(Path.exists, held)), 300), (tmp_path / "out.txt").read_text()
    subprocess.run(["scancel", "--signal=TERM", "--batch", done.stdout.strip()], env=environment, check=True)
    slurm_cluster.wait_for_jobs(slurm, timeout_s=240)
    output = (tmp_path / "out.txt").read_text()
    assert "stopped by a signal" in output, output
    assert "resumed from" in output
    steps = [entry["step"] for line in metrics.read_text().splitlines() if "loss" in (entry := json.loads(line))]
    assert steps == list(range(1, 81))
