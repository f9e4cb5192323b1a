"""What is wrong with a run is one red line and exit code 2 before anything is launched, in a dry run as in a run."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import WITHOUT_PRIVILEGES, restored_handlers, settings, skip_unless_privileges_can_be_dropped, tinyllama

from tinyllama import checkpoint
from tinyllama.cli.app import main
from tinyllama.data.loader import HeldOut, Source
from tinyllama.data.store import file_sha256
from tinyllama.errors import CheckpointError, DataError
from train import accelerators, launch
from train.metrics import MetricsFile
from train.plan import open_mixture
from train.recipe import load_recipe
from train.schedule import describe, learning_rate, refuse_jump
from train.state import refuse_other_run


@pytest.fixture
def refused(monkeypatch, capsys, stores, tmp_path):
    """The one red line of `tinyllama train`, with and without --dry-run; a launch fails the test."""

    def call(*arguments: object, more: tuple[str, ...] = (), data: Path = stores, dry: bool = True) -> str:
        monkeypatch.setattr(launch, "launch", lambda *_: pytest.fail("it was launched"))
        given = [*map(str, arguments)]
        given += [] if "--output" in given else ["--output", str(tmp_path / "unused")]
        lines = set()
        for extra in ([], ["--dry-run"]) if dry else ([],):
            command = ["tinyllama", "train", "--recipe", "demo", "--data", str(data)]
            monkeypatch.setattr(sys, "argv", [*command, *settings("training.tokens=6912", *more), *given, *extra])
            before = sorted(tmp_path.rglob("*"))
            with pytest.raises(SystemExit) as left:
                main()
            error = capsys.readouterr().err
            assert (left.value.code, error.count("\n")) == (2, 1), error
            assert sorted(tmp_path.rglob("*")) == before
            lines.add(error)
        assert len(lines) == 1, lines
        return lines.pop()

    with restored_handlers():  # a command that refuses leaves signals ignored: its program ends with it
        yield call


def test_an_output_that_no_run_can_have(refused, tmp_path, finished_run):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("gone")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "checkpoints").touch()
    (tmp_path / "odd2" / "metrics.jsonl").mkdir(parents=True)
    (tmp_path / "odd3" / "heartbeats" / "rank-00001.json").mkdir(parents=True)
    (tmp_path / "odd4").mkdir()
    (tmp_path / "odd4" / "metrics.partial").symlink_to("gone")
    for output, words in (
        ("file", "file is not a folder"),
        ("file/below", "file is not a folder"),
        ("loop", "loop"),
        ("nowhere", "is a link to nothing"),
        ("odd", "checkpoints is not a folder"),
        ("odd2", "metrics.jsonl cannot be written"),
        ("odd3", "rank-00001.json cannot be written"),
        ("odd4", "metrics.partial cannot be written"),
        ("n" * 300, "File name too long"),
    ):
        assert words in refused("--output", tmp_path / output)
    assert "has checkpoints; give another --output" in refused("--output", finished_run, "--resume", "never")
    assert "has no checkpoint; check --output" in refused("--resume", "must")


def test_folders_without_permission_are_refused_before_the_launch(stores, tmp_path):
    skip_unless_privileges_can_be_dropped()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    os.chmod(tmp_path / "run" / "checkpoints", 0o555)
    arguments = ["train", "--recipe", "demo", "--data", stores, "--output", tmp_path / "run", "--num-accelerators", 1]
    done = tinyllama(*arguments, *settings("training.tokens=6912"), check=False, under=WITHOUT_PRIVILEGES)
    assert done.returncode == 2
    assert done.stderr.strip().endswith(
        "checkpoints cannot be written; grant write permission, or give another --output"
    )
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num-accelerators", "0"], "--num-accelerators 0; give a number from 1"),
        (["--num-accelerators", "-2"], "--num-accelerators -2; give a number from 1"),
        (["--nodes", "0"], "--nodes 0; give a number from 1"),
        (["--nodes", "-1"], "--nodes -1; give a number from 1"),
        (["--eval-every", "0"], "evaluation.every_steps=0; give a whole number"),
        (["--eval-every", "2", "--set", "evaluation.tasks=hellaswagg"], "hellaswagg"),
        (["--eval-every", "2", "--set", "evaluation.tasks=humaneval"], "evaluation.tasks: humaneval generates text"),
        (["--eval-every", "2", "--set", "evaluation.data_dir=none"], "evaluation.data_dir none is not a folder"),
        (["--num-accelerators", "5"], "batch_tokens=768 is not a multiple of"),
        (["--tokenizer", "none.model"], "tokenizer none.model does not exist"),
        (["--tokenizer", "/"], "tokenizer / cannot be read"),
        (["--init-from", "nothing/here"], "nothing/here"),
        (["--init-from", "n" * 300], "File name too long"),
        (["--deepspeed", "n" * 300], "File name too long"),
        (["--recipe", "n" * 300], "File name too long"),
    ],
)
def test_wrong_arguments_are_refused_in_dry_runs_too(refused, arguments, words):
    assert words in refused(*arguments)


def test_more_ranks_than_devices_are_refused(refused, monkeypatch):
    monkeypatch.setattr(accelerators, "count_gpus", lambda: 2)
    assert "3 ranks on a machine with 2 GPUs" in refused("--num-accelerators", "3", dry=False)
    monkeypatch.setattr(accelerators, "count_gpus", lambda: 0)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert "12 ranks on a machine without a GPU and with 2 processors" in refused("--num-accelerators", "12", dry=False)


def copied(stores: Path, target: Path) -> Path:
    shutil.copytree(stores, target)
    return target


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("kind", ["missing", "short", "long"])
def test_missing_and_short_shards_of_both_splits_are_refused(refused, stores, tmp_path, split, kind):
    data = copied(stores, tmp_path / "data")
    shard = data / "code" / f"{split}-000000.tokens"
    shard.unlink() if kind == "missing" else os.truncate(shard, shard.stat().st_size + (-2 if kind == "short" else 2))
    assert f"{shard} {'is missing' if kind == 'missing' else 'has '}" in refused(data=data)


def test_a_corrupt_validation_shard_is_refused(refused, stores, tmp_path):
    data = copied(stores, tmp_path / "data")
    shard = data / "prose" / "validation-000000.tokens"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    assert f"{shard} does not match its checksum" in refused(data=data)


def test_a_token_beyond_the_vocabulary_names_store_shard_and_position(stores, tmp_path):
    data = copied(stores, tmp_path / "data")
    recipe = load_recipe("demo", settings("training.tokens=6912")[1::2])
    shard = data / "code" / "train-000000.tokens"
    tokens = np.fromfile(shard, dtype="<u2")
    place = len(tokens) // 2
    tokens[place] = 600  # the vocabulary is 0 to 599
    tokens.tofile(shard)
    mixture = open_mixture(recipe, data)
    windows = mixture.order.windows_of(range(20_000))
    reached = [n for n, (source, start, _) in enumerate(windows) if source == 1 and start <= place <= start + 64]
    assert reached
    with pytest.raises(DataError, match=rf"{shard} holds token 600 at position {place:,}, of a vocabulary of 600"):
        mixture.fetch([reached[0] - 1, reached[0]])
    mixture.fetch([reached[0] - 1])
    held = data / "code" / "validation-000000.tokens"
    tokens = np.fromfile(held, dtype="<u2")
    tokens[70] = 65535
    tokens.tofile(held)
    with pytest.raises(DataError, match=rf"{held} holds token 65535 at position 70"):
        HeldOut(Source("code", data / "code", 1.0), 64).fetch([0, 1])


def resumed_from(run: Path) -> tuple[Path, dict]:
    return checkpoint.newest_whole(run)


def test_what_does_not_change_the_order_may_change_on_resume(finished_run):
    where, old = resumed_from(finished_run)
    base = settings("training.tokens=6912")[1::2]
    same = old["mixture_sha256"]
    refuse_other_run(old, load_recipe("demo", [*base, "data.max_epochs=9"]), same, where)
    sources = '[{"name": "prose", "weight": 0.7, "store": "prose"}, {"name": "code", "weight": 0.3}]'
    refuse_other_run(old, load_recipe("demo", [*base, f"data.sources={sources}"]), same, where)
    for setting, words in (
        ("data.seed=4", "data.seed=3407, this recipe says 4"),
        ("data.document_masking=true", "data.document_masking=False"),
        ("data.sequence_length=32", "data.sequence_length=64"),
        ('data.sources=[{"name": "prose", "weight": 1}]', "data.sources"),
        (f"data.sources={sources.replace('0.7', '0.6')}", "data.sources"),
        ("model.rope_theta=5e5", "model.rope_theta=10000.0, this recipe says 500000.0"),
        ("training.batch_tokens=1536", "training.batch_tokens=768, this recipe says 1536"),
    ):
        with pytest.raises(CheckpointError, match=words):
            refuse_other_run(old, load_recipe("demo", [*base, setting]), same, where)
    with pytest.raises(CheckpointError, match="other data"):
        refuse_other_run(old, load_recipe("demo", base), "0" * 64, where)


def test_a_field_that_an_older_checkpoint_lacks_has_its_default(finished_run):
    where, old = resumed_from(finished_run)
    recipe = load_recipe("demo", settings("training.tokens=6912")[1::2])
    for section, name in (("data", "document_masking"), ("data", "max_epochs"), ("model", "rope_theta")):
        older = json.loads(json.dumps(old))
        del older["recipe"][section][name]
        refuse_other_run(older, recipe, old["mixture_sha256"], where)
    older = json.loads(json.dumps(old))
    del older["recipe"]["data"]["document_masking"], older["recipe"]["optimizer"]["decay_shape"]
    del older["recipe"]["training"]["reduce_once"], older["recipe"]["health"]
    masked = load_recipe("demo", [*settings("training.tokens=6912")[1::2], "data.document_masking=true"])
    with pytest.raises(CheckpointError, match="document_masking=False, this recipe says True"):
        refuse_other_run(older, masked, old["mixture_sha256"], where)
    assert refuse_jump(older, recipe, where, False) is None
    newer = json.loads(json.dumps(old))
    newer["recipe"]["data"]["from_the_future"] = 1
    with pytest.raises(CheckpointError, match=r"data\.from_the_future=1"):
        refuse_other_run(newer, recipe, old["mixture_sha256"], where)


def test_a_finished_cosine_with_more_tokens_is_refused_before_the_launch(refused, finished_run, capsys, monkeypatch):
    line = refused("--output", finished_run, more=("training.tokens=13824",))
    assert "the learning rate would jump from 0.0001 to 0.0018" in line
    assert "training.tokens 6,912 to 13,824" in line
    assert "--init-from" in line
    arguments = ["--output", str(finished_run), "--allow-rate-jump", "--dry-run"]
    command = ["tinyllama", "train", "--recipe", "demo", "--data", str(finished_run.parent)]
    monkeypatch.setattr(sys, "argv", [*command, *settings("training.tokens=13824"), *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    output = capsys.readouterr()
    assert not left.value.code, output.err
    assert "the learning rate goes from 0.0001 to 0.0018" in output.out


def checkpoint_of(recipe, step: int) -> dict:
    """What a checkpoint of `step` says of its recipe and its tokens."""
    return {"recipe": recipe.to_dict(), "tokens": step * recipe.training.batch_tokens}


def test_which_changes_of_the_schedule_are_jumps():
    where = Path("run/checkpoints/step-00000500")
    base = ["training.batch_tokens=2048", "training.tokens=2048000"]

    def change(step: int, old: list[str], new: list[str], allowed: bool = False) -> str | None:
        return refuse_jump(
            checkpoint_of(load_recipe(settings=[*base, *old]), step),
            load_recipe(settings=[*base, *new]),
            where,
            allowed,
        )

    wsd = ["optimizer.schedule=wsd"]
    longer = ["training.tokens=4096000"]
    # The stable part of wsd goes on with more tokens, or towards a nearer end, as if it had always been so.
    assert change(500, wsd, [*wsd, *longer]) is None
    assert change(500, wsd, [*wsd, "training.tokens=1433600"]) is None
    with pytest.raises(CheckpointError, match=r"jump from 4e-05 to 0\.0004.*before the decay"):
        change(1000, wsd, [*wsd, *longer])
    with pytest.raises(CheckpointError, match=r"jump from .* to .*--init-from"):
        change(500, [], longer)
    assert "goes from" in change(500, [], longer, allowed=True)
    # Downward it is said.
    assert "optimizer.lr 0.0004 to 0.0002" in change(500, [], ["optimizer.lr=2e-4"])
    assert change(1000, [], []) is None
    # The warm-up that is derived from the length is part of it.
    assert "goes from 0.0002" in change(50, [], longer)


def test_the_schedule_is_said_in_one_line():
    assert describe(load_recipe("tinyllama_120m", ["training.tokens=1e9"])) == (
        "learning rate 0.0006 after 190 of 1,908 steps of warm-up (10.0%, derived: optimizer.warmup_steps is null), "
        "then a cosine down to 6e-05"
    )
    recipe = load_recipe(
        "tinyllama_120m", ["training.tokens=1e9", "optimizer.schedule=wsd", "optimizer.warmup_steps=100"]
    )
    assert describe(recipe) == (
        "learning rate 0.0006 after 100 of 1,908 steps of warm-up (5.2%), stable until step 1,526, then 1-sqrt down to 6e-05"
    )
    batch = recipe.training.batch_tokens
    assert learning_rate(1525 * batch, recipe) == 6e-4 > learning_rate(1526 * batch, recipe)


def test_the_example_of_the_help_trains_sensibly(capsys, monkeypatch, tmp_path):
    """It reaches its rate, and most of it is the decay."""
    command = "tinyllama train --recipe tinyllama_120m --num-accelerators 2 --set training.tokens=1e9 --output"
    monkeypatch.setattr(sys, "argv", [*command.split(), str(tmp_path / "120m"), "--dry-run"])
    with pytest.raises(SystemExit) as left:
        main()
    output = capsys.readouterr()
    assert not left.value.code, output.err
    assert "after 190 of 1,908 steps of warm-up" in output.out


def test_checksums_of_a_tokenizer_are_compared(refused, stores, tmp_path):
    other = tmp_path / "tokenizer.model"
    other.write_bytes((stores / "tokenizer.model").read_bytes() + b"\x00")
    assert file_sha256(other) != file_sha256(stores / "tokenizer.model")
    assert "did not make these stores" in refused("--tokenizer", other)


def test_a_damaged_line_of_the_metrics_is_said_and_costs_no_other(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 5.0}).encode() for step in (1, 2, 3, 4)]
    lines.insert(
        1, json.dumps({"step": 2, "validation": {"a": {"loss": math.nan}}}).encode()
    )  # not quite JSON, but ours
    path.write_bytes(b"\n".join([*lines, b'{"step": 5, "lo']))  # cut short by a kill: nothing to say
    MetricsFile(path, 3).close()
    assert path.read_bytes().splitlines() == lines[:4]
    assert capsys.readouterr().err == ""
    for damage in (b'{"step": 2\xff}', b'{"stfp": 2}', b"[2]", b"2", b'{"step": "2"}', b'{"step": true}', b"\0"):
        path.write_bytes(b"\n".join([lines[0], damage, lines[3]]) + b"\n")
        MetricsFile(path, 3).close()
        assert path.read_bytes().splitlines() == [lines[0], lines[3]]
        assert "metrics.jsonl: line 2 is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--launcher", '"--master_port 1'], "No closing quotation; close what is quoted"),
        (["--hostfile", "none"], "--hostfile none cannot be read"),
        (["--nodes", "2", "--node-rank", "2", "--master", "h:1"], "number the machines from 0"),
        (["--nodes", "2", "--node-rank", "1", "--master", "h"], "--master h; give an address"),
        (["--set", "training.precision=fp8", "--set", "model.intermediate_size=360"], "intermediate_size is 360"),
        (
            ["--set", 'data.sources=[{"name": "a", "weight": 1, "store": "prose"}, {"name": "prose", "weight": 1}]'],
            "sources 'a' and 'prose' are the same store twice",
        ),
    ],
)
def test_what_cannot_be_started_is_refused_in_dry_runs_too(refused, arguments, words):
    assert words in refused(*arguments)


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "names no host"), ("a\n", "'a'"), ("a slots=0", "slots=0"), ("a slots=2\na slots=2", "each host once")],
)
def test_a_hostfile_that_deepspeed_would_refuse_is_one_line(refused, tmp_path, text, words):
    (tmp_path / "hosts").write_text(f"# ours\n\n{text}\n")
    assert words in refused("--hostfile", tmp_path / "hosts")


def test_a_dry_run_counts_the_ranks_of_a_hostfile(stores, tmp_path):
    (tmp_path / "hosts").write_text("a slots=4\nb slots=2\n")
    arguments = ["train", "--recipe", "demo", "--data", stores, "--hostfile", tmp_path / "hosts", "--dry-run", "--json"]
    assert json.loads(tinyllama(*arguments, *settings("training.tokens=6912")).stdout)["batch"]["ranks"] == 6


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"SLURM_STEP_NUM_NODES": "x"}, "SLURM_STEP_NUM_NODES='x' is not what Slurm writes"),
        ({"SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "0"}, "srun started None tasks"),
        ({"SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "", "SLURM_STEP_NUM_TASKS": "2"}, "SLURM_NODEID=''"),
        (
            {"SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "7"},
            "scontrol show hostnames",
        ),
    ],
)
def test_an_environment_that_is_not_slurms_is_one_line(refused, monkeypatch, environment, words):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert words in refused("--num-accelerators", "1", dry=False)


def test_a_run_that_has_gone_further_than_the_recipe_is_not_called_done(refused, finished_run):
    error = refused("--output", finished_run, "--set", "training.tokens=3072")
    assert "has been trained for 9 steps, this recipe says 4; give training.tokens=6912 or more" in error
