"""Preparing: the same bytes however it is run, wherever it is killed; whatever goes wrong is one line."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from conftest import ROOT, WITHOUT_PRIVILEGES, content, preparing, skip_unless_privileges_can_be_dropped, tinyllama

from tinyllama.data.documents import Rules
from tinyllama.data.inputs import InputFile
from tinyllama.data.pipeline import share
from tinyllama.data.prepare import prepare
from tinyllama.data.store import TokenStore, read_list, read_manifest, verify
from tinyllama.errors import DataError
from tinyllama.tokenizer.sentencepiece_model import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tokenizer_model: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_model)


@pytest.fixture(scope="module")
def inputs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus as ten files of every kind."""
    folder = tmp_path_factory.mktemp("inputs")
    texts = [json.loads(line)["text"] for line in (corpus / "prose.jsonl").read_text().splitlines()]
    for number in range(10):
        some = texts[number::10]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in some).encode()
        if number % 3 == 0:
            (folder / f"{number}.jsonl.zst").write_bytes(zstandard.compress(lines))
        elif number % 3 == 1:
            pq.write_table(pa.table({"content": some}), folder / f"{number}.parquet")
        else:
            (folder / f"{number}.jsonl.gz").write_bytes(gzip.compress(lines))
    return folder


@pytest.fixture(scope="module")
def unbroken(inputs: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed preparation writes."""
    store = tmp_path_factory.mktemp("unbroken") / "store"
    prepare([inputs], store, tokenizer, shard_tokens=30_000, workers=0)
    verify(store)
    return content(store)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_bytes_do_not_depend_on_workers(inputs, tokenizer, unbroken, tmp_path, workers):
    seen = []
    prepare([inputs], tmp_path / "store", tokenizer, shard_tokens=30_000, workers=workers, progress=seen.append)
    assert content(tmp_path / "store") == unbroken
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store", "tokenizer.model"]
    assert seen[-1].read_bytes == seen[-1].total_bytes == sum(path.stat().st_size for path in inputs.iterdir())
    assert seen[-1].files == seen[-1].total_files == 10


def test_bytes_do_not_depend_on_the_cache_of_words(inputs, tokenizer, unbroken, tmp_path):
    prepare([inputs], tmp_path / "store", tokenizer, shard_tokens=30_000, workers=0, plain=True)
    assert content(tmp_path / "store") == unbroken


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
    """The parent alone is killed, in the midst of its work; its workers must not go on writing beside the next attempt."""
    command = [sys.executable, "-m", "tinyllama", *preparing(inputs, tmp_path / "store", tokenizer_model)]
    command += ["--workers", "2", "--shard-tokens", "30000"]
    progress, generator = tmp_path / "store.partial" / "progress", random.Random(7)
    for _ in range(3):
        shutil.rmtree(progress, ignore_errors=True)  # of the attempt before
        process = subprocess.Popen([*map(str, command)], cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while not list(progress.glob("*.json")):  # the first report of a worker
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.002)
        time.sleep(generator.uniform(0, 0.05))
        workers = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert workers
        assert not psutil.wait_procs(workers, timeout=5)[1]
    assert not (tmp_path / "store").exists()
    tinyllama(*command[3:])
    assert content(tmp_path / "store") == unbroken
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store", "tokenizer.model"]


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
    # Large enough that the workers are alive when one is killed.
    for number in range(12):
        shutil.copyfile(inputs / "0.jsonl.zst", tmp_path / f"{number}.jsonl.zst")
        lines = zstandard.decompress((inputs / "0.jsonl.zst").read_bytes(), max_output_size=1 << 26) * 40
        (tmp_path / f"{number}.jsonl.zst").write_bytes(zstandard.compress(lines))
    command = [sys.executable, "-m", "tinyllama", "data", "prepare", *sorted(tmp_path.glob("*.zst"))]
    command += ["--output", tmp_path / "store", "--tokenizer", tokenizer_model, "--workers", "2"]
    process = subprocess.Popen([*map(str, command)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        progress = tmp_path / "store.partial" / "progress"
        deadline = time.monotonic() + 60
        while not list(progress.glob("*.json")) and time.monotonic() < deadline:
            time.sleep(0.02)
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


BROKEN = [
    ("a.jsonl", b'{"text": "fine"}\n{"text": \n', "a.jsonl:2"),
    ("b.jsonl.zst", zstandard.compress(b'{"text": "x"}\n' * 99999)[:-1], "breaks off"),
    ("c.jsonl", b'{"text": "\xff"}\n', "c.jsonl:1"),
    ("d.jsonl", b'{"text": "\\udc00"}\n', "lone surrogate"),
    ("e.parquet", b"not parquet", "not a readable parquet file"),
    ("f.txt", b"\xff\xfe\xff", "not UTF-8"),
    ("g.jsonl", b"\n\n", "no training documents"),
]


# With worker processes, which hand every error on in the same way, two kinds are enough.
@pytest.mark.parametrize(
    ("name", "data", "words", "workers"), [(*case, "0") for case in BROKEN] + [(*case, "2") for case in BROKEN[:2]]
)
def test_broken_input_is_one_clear_line_and_leaves_no_store(tmp_path, tokenizer_model, name, data, words, workers):
    (tmp_path / name).write_bytes(data)
    arguments = ["data", "prepare", tmp_path / name, "--output", tmp_path / "store", "--tokenizer", tokenizer_model]
    done = tinyllama(*arguments, "--workers", workers, check=False)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert words in errors[0]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--preset", "slimpyjama"], "did you mean slimpajama"),
        (["--bad-records", "drop"], "give refuse or skip"),
        (["--exclude", "meta"], "field=value"),
        (["--executor", "cloud"], "local, slurm or ray"),
        (["--executor", "slurm"], "slurm"),
        (["--validation-fraction", "1"], "from 0 to below 1"),
        (["--workers", "-1"], "above zero"),
        (["--tokenizer", "missing.model"], "missing.model"),
    ],
)
def test_mistakes_are_one_line(inputs, tokenizer_model, tmp_path, extra, words):
    arguments = ["data", "prepare", inputs, "--output", tmp_path / "store", "--tokenizer", tokenizer_model, *extra]
    done = tinyllama(*arguments, check=False, env={"PATH": "/nowhere"})
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "store").exists()


def test_skipped_records_are_listed_with_their_reasons(tmp_path, tokenizer_model):
    rows = [
        '{"text": "one"}',
        '{"text": ',
        '{"text": ""}',
        '{"text": "two"}',
        '{"other": 1}',
        '{"text": "%s"}' % ("x" * 300),
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    more = ["--bad-records", "skip", "--max-document-bytes", "200", "--validation-fraction", "0", "--workers", "0"]
    done = tinyllama(*preparing(tmp_path / "a.jsonl", tmp_path / "store", tokenizer_model), *more)
    assert "skipped: 4 records" in done.stdout
    skipped = list(read_list(tmp_path / "store", "skipped.jsonl"))
    assert [entry["record"] for entry in skipped] == [1, 2, 4, 5]
    assert ["not valid JSON" in skipped[0]["reason"], skipped[1]["reason"]] == [True, "empty"]
    assert read_manifest(tmp_path / "store").documents("train") == 2


def test_the_preset_excludes_and_counts(tmp_path, tokenizer_model):
    rows = [
        {"text": f"document {i}", "meta": {"redpajama_set_name": "RedPajamaGithub" if i % 3 == 0 else "RedPajamaC4"}}
        for i in range(30)
    ]
    (tmp_path / "in").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "in" / "0.jsonl.zst").write_bytes(zstandard.compress(lines))
    arguments = ["data", "prepare", tmp_path / "in", "--preset", "slimpajama", "--output", tmp_path / "store"]
    done = tinyllama(*arguments, "--tokenizer", tokenizer_model, "--json", "--workers", "0")
    found = json.loads(done.stdout)
    assert found["inputs"]["excluded"] == {"meta.redpajama_set_name=RedPajamaGithub": 10}
    assert sum(split["documents"] for split in found["splits"].values()) == 20


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


def test_no_permission_is_one_line(inputs, tokenizer_model, tmp_path):
    skip_unless_privileges_can_be_dropped()
    source = tmp_path / "in" / "0.jsonl.zst"
    source.parent.mkdir()
    shutil.copyfile(inputs / "0.jsonl.zst", source)
    closed = tmp_path / "closed"
    closed.mkdir()

    def run(output: Path) -> str:
        arguments = [*preparing(source.parent, output, tokenizer_model), "--workers", "1"]
        done = tinyllama(*arguments, under=WITHOUT_PRIVILEGES, check=False)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        (line,) = [line for line in done.stderr.splitlines() if "error:" in line]
        return line

    closed.chmod(0o500)
    assert "closed" in run(closed / "store")
    closed.chmod(0)
    assert "closed" in run(closed / "store")
    source.chmod(0)
    assert "0.jsonl.zst is not readable" in run(tmp_path / "store")


def test_output_and_input_do_not_lie_in_each_other(inputs, tokenizer, tmp_path):
    shutil.copytree(inputs, tmp_path / "in")
    with pytest.raises(DataError, match="lies inside the input"):
        prepare([tmp_path / "in"], tmp_path / "in" / "store", tokenizer, workers=0)
    with pytest.raises(DataError, match="would replace the input"):
        prepare([tmp_path / "in"], tmp_path, tokenizer, workers=0, overwrite=True)


def test_two_preparations_of_one_store_do_not_mix(inputs, tokenizer, tmp_path):
    import fcntl

    (tmp_path / "store.partial").mkdir()
    with open(tmp_path / "store.partial" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="being written by another process"):
            prepare([inputs], tmp_path / "store", tokenizer, workers=0)


def test_a_folder_that_is_no_store_is_left_alone(inputs, tokenizer, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "precious").write_text("data")
    with pytest.raises(DataError, match="not a token store"):
        prepare([inputs], tmp_path / "store", tokenizer, workers=0, overwrite=True)
    assert (tmp_path / "store" / "precious").read_text() == "data"


def test_shares_of_tasks_are_whole_and_even():
    sizes = [random.Random(1).randint(1, 1000) for _ in range(500)]
    for tasks in (1, 2, 7, 64):
        shares = [share(sizes, rank, tasks) for rank in range(tasks)]
        assert sorted(index for mine in shares for index in mine) == list(range(500))
        loads = [sum(sizes[index] for index in mine) for mine in shares]
        assert max(loads) - min(loads) <= 1000


def test_large_documents_do_not_need_large_memory(tokenizer_model, tmp_path):
    """One worker's peak, for a text of 12 MB in one document; see docs/data.md for the bound."""
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "some words of a very long book\n" * 400_000}) + "\n")
    program = (
        "import sys; from tinyllama.data.prepare import prepare;"
        "from tinyllama.tokenizer.sentencepiece_model import Tokenizer;"
        "prepare([sys.argv[1]], sys.argv[2], Tokenizer.load(sys.argv[3]), workers=0, validation_fraction=0);"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
    )
    command = [sys.executable, "-c", program, tmp_path / "a.jsonl", tmp_path / "store", tokenizer_model]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
    assert int(done.stdout) / 1024 < 512
    assert TokenStore(tmp_path / "store").num_documents == 1


def test_ray_writes_the_same_bytes(inputs, tokenizer_model, unbroken, tmp_path):
    pytest.importorskip("ray", reason="ray is not installed: pip install 'tinyllama[ray]'")
    arguments = ["data", "prepare", inputs, "--output", tmp_path / "store", "--tokenizer", tokenizer_model]
    tinyllama(*arguments, "--shard-tokens", "30000", "--executor", "ray", "--tasks", "3")
    assert content(tmp_path / "store") == unbroken


def test_rules_reach_the_workers(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
    prepare(
        [tmp_path / "a.jsonl"], tmp_path / "store", tokenizer, rules=Rules("body"), validation_fraction=0, workers=1
    )
    assert TokenStore(tmp_path / "store").num_documents == 2
