"""Damage of every kind to a run's newest checkpoint: the newest whole one counts, in every command, and nothing is lost."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import settings, train

from tinyllama import checkpoint
from tinyllama.cli.app import main
from tinyllama.data.store import file_sha256
from tinyllama.errors import CheckpointError
from train import before_launch
from train.recipe import CheckpointConfig
from train.saver import kept_steps


@pytest.fixture
def run(finished_run, tmp_path) -> Path:
    """A copy of the finished run with the checkpoints 3, 6 and 9."""
    shutil.copytree(finished_run, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a command in this process: (exit code, standard output, standard error)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tinyllama", *map(str, arguments)])
        checkpoint._said.clear()
        with pytest.raises(SystemExit) as left:
            main()
        return (int(left.value.code or 0), *capsys.readouterr())

    return call


def newest(run: Path, check: Callable[[Path], dict] | None = None) -> int:
    found = checkpoint.newest_whole(run, lambda text: None, check)
    assert found is not None
    return found[1]["step"]


def flips(path: Path, positions, masks=(1,)):
    """The file with one byte changed, once for each position and mask; in the end as it was."""
    content = path.read_bytes()
    with open(path, "r+b", buffering=0) as stream:
        for position in positions:
            for mask in masks:
                os.pwrite(stream.fileno(), bytes([content[position] ^ mask]), position)
                yield position, mask
            os.pwrite(stream.fileno(), content[position : position + 1], position)


def test_every_byte_of_the_manifest_counts(run):
    folder = checkpoint.resolve(run)
    path = folder / "manifest.json"
    space_to_tab = ord(" ") ^ ord("\t")
    for position, mask in flips(path, range(path.stat().st_size), (1, 0x20, space_to_tab, 0x80)):
        with pytest.raises(CheckpointError):
            checkpoint.inspect(folder)
        if position % 100 == 0:
            assert newest(run, checkpoint.inspect) == 6, (position, mask)
    assert newest(run) == 9


SMALL = ("state.json", "rng-00000.json", "rng-00001.json", "tokenizer.model")


@pytest.mark.parametrize("name", [*SMALL, "shard-00000.safetensors", "shard-00001.safetensors"])
def test_random_flips_of_every_other_file_fall_back(run, name):
    path = checkpoint.resolve(run) / name
    draw = random.Random(name)
    positions = [draw.randrange(path.stat().st_size) for _ in range(100 if "shard" in name else 25)]
    for position, mask in flips(path, positions, (1 << draw.randrange(8),)):
        assert newest(run) == 6, (name, position, mask)
    assert newest(run) == 9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["manifest.json", *SMALL])
def test_every_flip_of_every_small_file_falls_back(run, name):
    """All bytes, as the command line reads a checkpoint: tens of thousands of them."""
    folder = checkpoint.resolve(run)
    path = folder / name
    for position, mask in flips(path, range(path.stat().st_size), (1 << random.Random(name).randrange(8),)):
        with pytest.raises(CheckpointError):
            checkpoint.inspect(folder)
        if position % 1000 == 0:
            assert newest(run, checkpoint.inspect) == 6, (position, mask)


def consistent(folder: Path, name: str, content: bytes) -> None:
    """Another content of a file, with its checksum in the manifest."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(content), "sha256": file_sha256(folder / name)}
    (folder / "manifest.json").write_text(checkpoint.manifest_text(manifest["files"]))


def changed_state(**more: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        state = {**json.loads((folder / "state.json").read_text()), **more}
        consistent(folder, "state.json", json.dumps(state).encode())

    return change


def changed_recipe(**sections: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        recipe = json.loads((folder / "state.json").read_text())["recipe"]
        changed_state(recipe={**recipe, **sections})(folder)

    return change


def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        shutil.rmtree(folder)
        make(folder)

    return change


def manifest_of(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        change(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")

    return make


DAMAGE = {
    "empty folder": replaced(Path.mkdir),
    "file for a folder": replaced(Path.touch),
    "link to itself": replaced(lambda folder: folder.symlink_to(folder.name)),
    "link to nothing": replaced(lambda folder: folder.symlink_to("nowhere")),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "no state": lambda folder: (folder / "state.json").unlink(),
    "no shard": lambda folder: (folder / "shard-00001.safetensors").unlink(),
    "no generators": lambda folder: (folder / "rng-00000.json").unlink(),
    "pipe for a manifest": lambda folder: ((folder / "manifest.json").unlink(), os.mkfifo(folder / "manifest.json")),
    "empty state": lambda folder: (folder / "state.json").write_bytes(b""),
    "empty manifest": lambda folder: (folder / "manifest.json").write_bytes(b""),
    "empty shard": lambda folder: (folder / "shard-00000.safetensors").write_bytes(b""),
    "short shard": lambda folder: os.truncate(folder / "shard-00000.safetensors", 1000),
    "longer shard": lambda folder: os.truncate(folder / "shard-00000.safetensors", 10_000_000),
    "folder for a shard": lambda folder: (
        (folder / "shard-00000.safetensors").unlink(),
        (folder / "shard-00000.safetensors").mkdir(),
    ),
    "shard that links to itself": lambda folder: (
        (folder / "shard-00000.safetensors").unlink(),
        (folder / "shard-00000.safetensors").symlink_to("shard-00000.safetensors"),
    ),
    "manifest that is a list": lambda folder: (folder / "manifest.json").write_text("[]\n"),
    "manifest without files": manifest_of(lambda manifest: manifest.pop("files")),
    "manifest of no files": manifest_of(lambda manifest: manifest.update(files={})),
    "manifest of other sizes": manifest_of(lambda manifest: manifest["files"]["state.json"].update(bytes="1")),
    "manifest that leads out": manifest_of(
        lambda manifest: manifest["files"].update({"../x": {"bytes": 1, "sha256": ""}})
    ),
    "manifest without a shard": manifest_of(lambda manifest: manifest["files"].pop("shard-00001.safetensors")),
    "manifest of another format": manifest_of(lambda manifest: manifest.update(format="tinyllama-checkpoint-2")),
    "manifest in another form": lambda folder: (folder / "manifest.json").write_text(
        json.dumps(json.loads((folder / "manifest.json").read_text()))
    ),
    "state that is a list": lambda folder: consistent(folder, "state.json", b"[]"),
    "state that is null": lambda folder: consistent(folder, "state.json", b"null"),
    "state with a key twice": lambda folder: consistent(
        folder,
        "state.json",
        (folder / "state.json").read_bytes().replace(b'{\n "step": 9', b'{\n "step": 9, "step": 9'),
    ),
    "state of another step": changed_state(step=8),
    "step that is text": changed_state(step="9"),
    "step that is true": changed_state(step=True),
    "negative tokens": changed_state(tokens=-1),
    "tokens that are null": changed_state(tokens=None),
    "recipe that is a list": changed_state(recipe=[]),
    "recipe without a model": changed_state(recipe={}),
    "recipe with an odd model": changed_state(recipe={"model": {"hidden_size": "wide"}}),
    "no ranks": changed_state(ranks=0),
    "more ranks than shards": changed_state(ranks=3),
    "more ranks than any machine has": changed_state(ranks=10**12),
    "spikes that are numbers": changed_state(spikes=[1]),
    "losses that are text": changed_state(loss_window=["1"]),
    "start without a path": changed_state(init_from={}),
    "batch of nothing": changed_recipe(training={"tokens": 6912, "batch_tokens": 0}),
    "training that is a list": changed_recipe(training=[]),
    "optimizer that is text": changed_recipe(optimizer="adam"),
    "sources that are text": changed_recipe(data={"sources": ["prose"]}),
    "spikes that are an object": changed_state(spikes={}),
    "start that is text": changed_state(init_from="x"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_every_kind_of_damage_falls_back_and_is_left_as_it_is(run, kind):
    folder = run / "checkpoints" / checkpoint.step_name(9)
    DAMAGE[kind](folder)
    before = sorted(str(path) for path in run.rglob("*"))
    said: list[str] = []
    for check in (checkpoint.inspect, checkpoint.verify):
        found = checkpoint.newest_whole(run, said.append, check)
        assert found is not None
        assert found[1]["step"] == 6
    assert len(said) == 2
    assert all(str(folder) in text and "\n" not in text for text in said)
    assert all(text.endswith("step-00000006 is taken instead") for text in said)
    assert checkpoint.resolve(run).name == checkpoint.step_name(6)
    if not (folder.is_dir() and (folder / "config.json").exists()):
        assert checkpoint.is_checkpoint(folder)
        with pytest.raises(CheckpointError):
            checkpoint.verify(checkpoint.resolve(folder))
    assert sorted(str(path) for path in run.rglob("*")) == before


def test_what_is_no_part_of_a_checkpoint_is_not_read(run):
    folder = run / "checkpoints" / checkpoint.step_name(9)
    (folder / "shard-00007.safetensors").write_bytes(b"nonsense")
    (folder / ".nfs0001").touch()
    (run / "checkpoints" / "latest").write_bytes(b"\xff\x00garbage")
    (run / "checkpoints" / "step-x").mkdir()
    assert newest(run) == 9
    assert len(dict(checkpoint.read_weights(folder))) == 21


def test_a_file_that_changes_after_it_was_read_is_read_again(run):
    folder = checkpoint.resolve(run)
    shard = folder / "shard-00000.safetensors"
    for path in folder.iterdir():
        os.utime(path, (1e9, 1e9))
    assert newest(run) == 9
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    os.utime(shard, (1e9, 1e9))
    assert newest(run) == 6


def test_a_file_without_permission_is_skipped(run, monkeypatch):
    """Root is refused nothing, so that the refusal is the operating system's error itself."""
    denied = checkpoint.resolve(run) / "state.json"

    def refuse(path: Path) -> str:
        if path == denied:
            raise PermissionError(13, "Permission denied")
        return file_sha256(path)

    monkeypatch.setattr(checkpoint, "file_sha256", refuse)
    assert newest(run) == 6


def test_commands_take_the_newest_whole_one_of_a_run_and_refuse_a_damaged_one_itself(run, command, tmp_path, stores):
    folder = run / "checkpoints" / checkpoint.step_name(9)
    shard = folder / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-100] ^= 4
    shard.write_bytes(content)
    code, _, err = command("export", run, "--output", tmp_path / "export")
    assert code == 0, err
    assert "skipping checkpoint" in err
    assert json.loads((tmp_path / "export" / "tinyllama_export.json").read_text())["step"] == 6
    code, _, err = command("export", folder, "--output", tmp_path / "other")
    assert (code, err.count("\n")) == (2, 1)
    assert "shard-00001.safetensors does not match its checksum" in err
    dry = ["train", "--dry-run", "--recipe", "demo", "--data", stores, *settings("training.tokens=6912")]
    for start, expected in ((run, 0), (folder, 2)):
        code, _, err = command(*dry, "--output", tmp_path / "new", "--init-from", start)
        assert code == expected, err
        assert "does not match its checksum" in err
    # As the ranks choose, and as the command line does before it starts them: without every byte of a shard.
    assert before_launch.choose_checkpoint(run, "auto")[1]["step"] == 6
    (folder / "state.json").write_bytes(b"{}")
    code, _, err = command(*dry, "--output", run)
    assert code == 0, err
    assert "skipping checkpoint" in err
    for step in (3, 6):
        (run / "checkpoints" / checkpoint.step_name(step) / "state.json").unlink()
    for resume in ("auto", "must"):
        code, _, err = command(*dry, "--output", run, "--resume", resume)
        assert code == 2
        assert "none of the 3 checkpoints in" in err.splitlines()[-1]


@pytest.mark.slow
def test_a_run_whose_checkpoints_all_have_a_flip_is_refused_by_the_ranks_and_loses_none(run, stores):
    for _, folder in checkpoint.list_checkpoints(run):
        shard = folder / "shard-00000.safetensors"
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    done = train(stores, run, "training.tokens=6912", check=False)
    assert done.returncode == 2, done.stderr
    assert "none of the 3 checkpoints" in [line for line in done.stderr.splitlines() if line.startswith("error:")][-1]
    assert [step for step, _ in checkpoint.list_checkpoints(run)] == [3, 6, 9]


def test_what_is_kept():
    config = CheckpointConfig(every_steps=5, keep_last=2, keep_every_steps=20)
    assert kept_steps([5, 10, 15, 20, 25, 30], config) == [20, 25, 30]
    # A signal's is kept until another of its kind, and takes no place of the schedule's.
    assert kept_steps([5, 10, 12], config) == [5, 10, 12]
    assert kept_steps([5, 10, 12, 15], config) == [10, 12, 15]
    assert kept_steps([10, 12, 13, 15], config) == [10, 13, 15]
    assert kept_steps([10, 13, 15, 20], config) == [15, 20]
    assert kept_steps([2, 3], config) == [2, 3]
    assert kept_steps([1, 2, 3, 5], config) == [3, 5]


def test_torch_reads_the_weights_of_the_fallback(run):
    expected = dict(checkpoint.read_weights(run / "checkpoints" / checkpoint.step_name(6)))
    DAMAGE["short shard"](run / "checkpoints" / checkpoint.step_name(9))
    model, tokenizer = checkpoint.load_model(run)
    assert tokenizer.parent.name == checkpoint.step_name(6)
    assert torch.equal(model.model.embed_tokens.weight, expected["model.embed_tokens.weight"])
