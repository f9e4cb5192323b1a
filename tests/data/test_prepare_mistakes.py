"""Preparing from what cannot be used, or to where nothing may be written: one line, and nothing is touched."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import zstandard
from conftest import WITHOUT_PRIVILEGES, preparing, skip_unless_privileges_can_be_dropped, tinyllama

from tinyllama.data.prepare import prepare
from tinyllama.data.work import lock
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
