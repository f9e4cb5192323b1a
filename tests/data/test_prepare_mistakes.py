"""Preparing from what cannot be used, or to where nothing may be written: one line, and nothing is touched."""

from __future__ import annotations

import functools
import os
import shutil
from pathlib import Path

import pytest
import zstandard
from conftest import WITHOUT_PRIVILEGES, preparing, skip_unless_privileges_can_be_dropped, tinyllama

from tinyllama import locks
from tinyllama.data.documents import Rules
from tinyllama.data.prepare import prepare
from tinyllama.data.store import verify
from tinyllama.data.work import Work, lock
from tinyllama.errors import DataError
from tinyllama.locks import InUseError

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
    arguments = preparing(tmp_path / name, tmp_path / "store", tokenizer_model)
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
    arguments = preparing(inputs, tmp_path / "store", tokenizer_model)
    done = tinyllama(*arguments, *extra, check=False, env={"PATH": "/nowhere"})
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "store").exists()


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
    with lock(tmp_path / "store.partial"), pytest.raises(InUseError, match=r"in use by tinyllama data prepare \(pid"):
        prepare([inputs], tmp_path / "store", tokenizer, workers=0)


def test_a_folder_that_is_no_store_is_left_alone(inputs, tokenizer, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "precious").write_text("data")
    with pytest.raises(DataError, match="not a token store"):
        prepare([inputs], tmp_path / "store", tokenizer, workers=0, overwrite=True)
    assert (tmp_path / "store" / "precious").read_text() == "data"


@pytest.mark.parametrize("most", [0, -1, 10**30])
def test_the_size_of_a_document_has_a_range(tmp_path, tokenizer, most):
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(DataError, match=r"max document bytes .*give a number from 1 to"):
        prepare([tmp_path / "a.txt"], tmp_path / "s", tokenizer, rules=Rules(max_document_bytes=most), workers=0)


@pytest.mark.parametrize("manifest", [b'{"format": "tinyllama-checkpoint-1", "files": {}}', b"{}", b"\xff"])
def test_overwriting_replaces_stores_and_nothing_else(tmp_path, tokenizer, manifest):
    (tmp_path / "a.txt").write_text("words")
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "manifest.json").write_bytes(manifest)
    call = functools.partial(prepare, [tmp_path / "a.txt"], tmp_path / "s", tokenizer, overwrite=True, workers=0)
    with pytest.raises(DataError, match="is not that of a token store"):
        call(validation_fraction=0)
    assert (tmp_path / "s" / "manifest.json").read_bytes() == manifest
    (tmp_path / "s" / "shards.jsonl").touch()  # a store that a disk has damaged
    assert call(validation_fraction=0).documents("train") == 1


def test_the_root_is_no_output(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(DataError, match="/ is no name of a file or folder"):
        prepare([tmp_path / "a.txt"], "/", tokenizer, workers=0)
    with pytest.raises(DataError, match="/ is no name of a file or folder"):
        locks.beside(Path("/"))


@pytest.mark.parametrize("name", ["parts/*/*.json", "layout.json", "shards/*.json", "jobs.json"])
@pytest.mark.parametrize("content", ["", "{}", "[]", "5", '"x"', "null", "[" * 100_000, "\xff"])
def test_damaged_notes_of_an_unfinished_store_are_written_anew(tmp_path, tokenizer, monkeypatch, name, content):
    if name == "jobs.json" and content == '"x"':
        content = '{"a": 1}'
    (tmp_path / "a.txt").write_text("some words " * 20)
    call = functools.partial(prepare, [tmp_path / "a.txt"], tmp_path / "s", tokenizer, workers=0, validation_fraction=0)
    with monkeypatch.context() as patch:
        patch.setattr(Work, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            call()
    paths = [*(tmp_path / "s.partial").glob(name)] or [tmp_path / "s.partial" / name]
    paths[0].write_bytes(content.encode("latin-1"))
    assert call().documents("train") == 1
    verify(tmp_path / "s")


@pytest.mark.parametrize("kind", ["documents", "tokens"])
@pytest.mark.parametrize("place", ["parts/*", "store"])
def test_damaged_files_of_an_unfinished_store_are_made_anew(tmp_path, tokenizer, monkeypatch, kind, place):
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(f"some words {number}")
    inputs = sorted(tmp_path.glob("*.txt"))
    call = functools.partial(prepare, inputs, tmp_path / "s", tokenizer, workers=0, validation_fraction=0)
    with monkeypatch.context() as patch:
        stage = "publish" if place == "store" else "lay_out"
        patch.setattr(Work, stage, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            call()
    first, *_ = sorted((tmp_path / "s.partial").glob(f"{place}/*.{kind}"), key=lambda path: -path.stat().st_size)
    os.truncate(first, 0)
    assert call().documents("train") == 3
    verify(tmp_path / "s")
