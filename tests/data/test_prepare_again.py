"""Preparing where something is already: a finished store, a damaged one, another process, another tokenizer."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT, content, preparing, tinyllama

from tinyllama.data.pipeline import share
from tinyllama.data.prepare import prepare
from tinyllama.data.store import verify
from tinyllama.data.work import lock
from tinyllama.errors import DataError
from tinyllama.locks import InUseError
from tinyllama.tokenizer.sentencepiece_model import Tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for name in "ab":
        lines = (f'{{"text": "document {name} {number}"}}\n' for number in range(50))
        (tmp_path / "in" / f"{name}.jsonl").write_text("".join(lines))
    return tmp_path


def again(folder: Path, tokenizer: Tokenizer, **more):
    return prepare([folder / "in"], folder / "store", tokenizer, workers=0, shard_tokens=200, **more)


def test_a_finished_store_is_not_written_again(folder, tokenizer):
    first = again(folder, tokenizer)
    times = {path.name: path.stat().st_mtime_ns for path in (folder / "store").iterdir()}
    assert again(folder, tokenizer) == first
    assert {path.name: path.stat().st_mtime_ns for path in (folder / "store").iterdir()} == times
    assert not (folder / "store.partial").exists()


@pytest.mark.parametrize("name", ["train-000001.tokens", "validation-000000.tokens", "manifest.json"])
def test_a_damaged_store_is_named_and_overwrite_mends_it(folder, tokenizer, name):
    again(folder, tokenizer, validation_fraction=0.2)
    whole = content(folder / "store")
    os.truncate(folder / "store" / name, len(whole[name]) - 2)
    with pytest.raises(DataError, match=f"{name}.*--overwrite"):
        again(folder, tokenizer, validation_fraction=0.2)
    again(folder, tokenizer, validation_fraction=0.2, overwrite=True)
    assert content(folder / "store") == whole


def test_overwrite_always_writes_anew(folder, tokenizer):
    again(folder, tokenizer)
    whole = content(folder / "store")
    shard = folder / "store" / "train-000000.tokens"
    shard.write_bytes(bytes(len(whole[shard.name])))  # of the right size
    again(folder, tokenizer, overwrite=True)
    assert content(folder / "store") == whole


def test_a_store_of_another_format_is_replaced_by_overwrite_alone(folder, tokenizer):
    again(folder, tokenizer)
    manifest = folder / "store" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"version": 2', '"version": 1'))
    with pytest.raises(DataError, match="--overwrite"):
        again(folder, tokenizer)
    again(folder, tokenizer, overwrite=True)
    verify(folder / "store")


def test_nothing_is_touched_while_another_process_writes(folder, tokenizer):
    """Not even the check whether the store is finished: its end may remove the folder of the other."""
    again(folder, tokenizer)
    partial = folder / "store.partial"
    with lock(partial):
        (partial / "kept").touch()
        for overwrite in (False, True):
            with pytest.raises(InUseError, match=r"store\.partial is in use"):
                again(folder, tokenizer, overwrite=overwrite)
        assert (partial / "kept").exists()
    again(folder, tokenizer)
    assert not partial.exists()


def test_a_lock_of_a_folder_that_is_gone_does_not_count(folder):
    """The other has finished and removed the folder between our opening its lock and our taking it."""
    partial = folder / "store.partial"
    with lock(partial):
        shutil.rmtree(partial)
        with lock(partial):
            pass


def test_another_tokenizer_beside_the_store_is_refused_before_the_work(folder, tokenizer):
    (folder / "tokenizer.model").write_bytes(b"another")
    with pytest.raises(DataError, match="share one tokenizer"):
        again(folder, tokenizer)
    assert sorted(path.name for path in folder.iterdir()) == ["in", "tokenizer.model"]


def test_files_before_a_broken_one_of_the_same_task_are_kept(folder, tokenizer):
    good = (folder / "in" / "b.jsonl").read_bytes()
    for number in range(40):  # sixteen tasks
        shutil.copyfile(folder / "in" / "a.jsonl", folder / "in" / f"a{number}.jsonl")
    (folder / "in" / "b.jsonl").write_bytes(good[:90])  # some documents, then half a record
    with pytest.raises(DataError, match=r"b\.jsonl"):
        again(folder, tokenizer)
    parts = folder / "store.partial" / "parts"
    plan = json.loads((folder / "store.partial" / "plan.json").read_text())
    names, sizes = ([file[key] for file in plan["files"]] for key in ("name", "size_bytes"))
    broken = next(rank for rank in range(16) if names.index("b.jsonl") in share(sizes, rank, 16))
    finished = {json.loads(path.read_text())["identity"]["name"] for path in parts.glob("*/*.json")}
    assert {names[i] for i in share(sizes, broken, 16) if names[i] < "b.jsonl"} <= finished
    assert len(share(sizes, broken, 16)) > 1
    assert "b.jsonl" not in finished
    assert not list(parts.glob("*/*.partial"))
    (folder / "in" / "b.jsonl").write_bytes(good)
    assert again(folder, tokenizer).inputs["records"] == 42 * 50


def test_numbers_that_make_no_sense_are_one_line(folder, tokenizer_model):
    arguments = preparing(folder / "in", folder / "store", tokenizer_model)
    for extra, words in ((["--tasks", "0"], "--tasks 0"), (["--executor", "dask"], "give local, slurm or ray")):
        done = tinyllama(*arguments, *extra, check=False)
        assert done.returncode == 2
        assert words in done.stderr
        assert "Traceback" not in done.stderr


def test_the_documented_slurm_script_ends_when_the_run_is_killed(tmp_path):
    """SIGKILL gives the run no chance to say that it may be continued: the job fails, it does not wait for ever."""
    text = (ROOT / "docs" / "data.md").read_text()
    script = next(block for block in text.split("```") if block.startswith("bash") and "requeue" in block)
    program = tmp_path / "tinyllama"
    program.write_text(f"#!/bin/bash\necho $$ > {tmp_path / 'pid'}\nexec sleep 60\n")
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    job = subprocess.Popen(["bash", "-c", script.removeprefix("bash")], env=environment)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.01)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    assert job.wait(timeout=60) == 128 + signal.SIGKILL
