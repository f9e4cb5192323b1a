"""Preparing, killed or out of space wherever it may be: the same command goes on and ends with the same bytes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT, content, members, preparing, tinyllama, until
from holding import Hold

from tinyllama.data.inputs import InputFile
from tinyllama.data.prepare import prepare
from tinyllama.data.store import read_manifest, verify
from tinyllama.errors import DataError

KILLED = """
import os, random, signal, sys
from tinyllama.data.prepare import prepare
from tinyllama.tokenizer.sentencepiece_model import Tokenizer

tokenizer = Tokenizer.load(sys.argv[3])
left, seen = int(sys.argv[4]), 0

def at(event, arguments):
    global seen
    if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"):
        if any(sys.argv[2] in str(argument) for argument in arguments):
            seen += 1
            if seen == left:
                os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(at)
prepare([sys.argv[1]], sys.argv[2], tokenizer, shard_tokens=30_000, workers=0)
print(seen)
"""


def test_killed_at_twenty_random_moments_it_ends_with_the_same_bytes(inputs, tokenizer, unbroken, tmp_path):
    """SIGKILL at the n-th touch of a file of the store: at every kind of moment, from the first to the last rename."""
    program = [sys.executable, "-c", KILLED, inputs]

    def run(target: Path, left: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*map(str, program), str(target), str(tokenizer.path), str(left)],
            capture_output=True,
            text=True,
            check=False,
        )

    whole = run(tmp_path / "count", 0)
    touches = int(whole.stdout)
    assert touches > 100
    moments = [*random.Random(5).sample(range(1, touches), 17), touches - 2, touches - 1, touches]
    for number, moment in enumerate(moments):
        target = tmp_path / f"{number}" / "store"
        target.parent.mkdir()
        assert run(target, moment).returncode == -signal.SIGKILL
        if (target / "manifest.json").exists():
            verify(target)  # what has the name of a store is one
        prepare([inputs], target, tokenizer, shard_tokens=30_000, workers=0)
        assert content(target) == unbroken, moment
        assert sorted(path.name for path in target.parent.iterdir()) == ["store", "tokenizer.model"]


def test_killed_again_and_again_with_workers_it_still_ends(inputs, tokenizer_model, unbroken, tmp_path):
    """The parent alone is killed; its workers must not go on writing beside the next attempt."""
    stores = tmp_path / "stores"
    command = [sys.executable, "-m", "tinyllama", *preparing(inputs, stores / "store", tokenizer_model)]
    command += ["--workers", "2", "--shard-tokens", "30000"]
    for look in (1, 2, 1):  # the parent is held as it reads what its workers report
        shutil.rmtree(stores / "store.partial" / "progress", ignore_errors=True)
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        hold = Hold(folder, "command|open|store.partial/progress/", look)
        environment = {**os.environ, **hold.environment, "HERE": str(folder)}
        process = subprocess.Popen(
            [*map(str, command)], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        hold.wait(process)
        assert len(members(f"HERE={folder}")) >= 2  # it has workers
        process.kill()
        process.wait()
        assert until(lambda folder=folder: not members(f"HERE={folder}"))
    tinyllama(*command[3:])
    assert content(stores / "store") == unbroken
    assert sorted(path.name for path in stores.iterdir()) == ["store", "tokenizer.model"]


def test_only_unfinished_files_are_read_again(inputs, tokenizer, tmp_path):
    shutil.copytree(inputs, tmp_path / "in")
    (tmp_path / "in" / "5.jsonl.gz").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"5\.jsonl\.gz"):
        prepare([tmp_path / "in"], tmp_path / "store", tokenizer, workers=0)
    assert not (tmp_path / "store").exists()
    parts = tmp_path / "store.partial" / "parts"
    finished = {json.loads(path.read_text())["identity"]["name"] for path in parts.glob("*/*.json")}
    assert {"0.jsonl.zst"} <= finished <= {f.name for f in inputs.iterdir()} - {"5.jsonl.gz"}
    shutil.copyfile(inputs / "5.jsonl.gz", tmp_path / "in" / "5.jsonl.gz")
    (tmp_path / "in" / "0.jsonl.zst").touch()  # changed, for all we know
    read = []
    original = InputFile.open

    def counting(self):
        read.append(self.name)
        return original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InputFile, "open", counting)
        prepare([tmp_path / "in"], tmp_path / "store", tokenizer, workers=0)
    assert sorted(read) == sorted({f.name for f in inputs.iterdir()} - finished | {"0.jsonl.zst"})
    # Another file, and a store of the same name: nothing is replaced unasked.
    with pytest.raises(DataError, match="other inputs or settings"):
        prepare([tmp_path / "in"], tmp_path / "store", tokenizer, seed=1, workers=0)
    assert prepare([tmp_path / "in"], tmp_path / "store", tokenizer, workers=0).sha256  # finished: nothing to do
    prepare([tmp_path / "in"], tmp_path / "store", tokenizer, seed=1, workers=0, overwrite=True)
    assert read_manifest(tmp_path / "store").seed == 1


def test_a_killed_worker_is_an_error_and_the_rest_is_kept(inputs, tokenizer_model, unbroken, tmp_path):
    """Fault 13: child processes whose fate nobody looked at."""
    hold = Hold(tmp_path, "worker|open|.jsonl.zst")  # workers wait as they open their first input
    command = [sys.executable, "-m", "tinyllama", *preparing(inputs, tmp_path / "store", tokenizer_model)]
    environment = {**os.environ, **hold.environment}
    process = subprocess.Popen(
        [*map(str, command), "--workers", "2"], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        hold.wait(process)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        workers = [c for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]
        os.kill(int(workers[0]), signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 2
    assert "a worker was killed" in errors
    assert not (tmp_path / "store").exists()
    tinyllama(*command[3:])
    verify(tmp_path / "store")


def test_a_full_disk_is_one_line_and_goes_on_later(inputs, tokenizer_model, unbroken, tmp_path):
    """On a file system of its own, too small at first."""
    if os.geteuid() != 0 or subprocess.run(["unshare", "--mount", "true"], check=False).returncode:
        pytest.skip("needs a mount namespace")
    disk = tmp_path / "disk"
    disk.mkdir()
    prepare_it = (
        f"{sys.executable} -m tinyllama data prepare {inputs} --output {disk}/store --tokenizer {tokenizer_model} "
        "--workers 1 --shard-tokens 30000"
    )
    script = (
        f"mount -t tmpfs -o size=350k tmpfs {disk} && ({prepare_it}; echo first $?; ls {disk}; "
        f"mount -o remount,size=50m {disk} && {prepare_it} >/dev/null; echo second $?; cp -r {disk}/store {tmp_path}/copy)"
    )
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", script], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert "first 2" in done.stdout, done.stdout + done.stderr
    assert done.stdout.split("first 2")[1].split()[0] == "store.partial"
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert "No space left on device" in errors[0]
    assert "second 0" in done.stdout
    assert content(tmp_path / "copy") == unbroken
