"""Tokenizers trained here: Llama's settings, and the same model from the same text."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import psutil
import pytest
from conftest import LLAMA2, ROOT, tinyllama

from tinyllama.errors import DataError, UserError
from tinyllama.processes import start_ticks
from tinyllama.tokenizer.sentencepiece_model import Tokenizer, parse
from tinyllama.tokenizer.train import LLAMA_SETTINGS, Coverage, lines, sample, train


def test_trained_models_have_llamas_settings(tokenizer_model):
    if not LLAMA2.exists():
        pytest.skip("Llama 2's tokenizer.model is not part of this project (../shared/tokenizer is absent)")
    ours, llama = parse(tokenizer_model.read_bytes()), parse(LLAMA2.read_bytes())
    for key in LLAMA_SETTINGS:
        for part in ("trainer_spec", "normalizer_spec"):
            if hasattr(getattr(llama, part), key):
                assert getattr(getattr(ours, part), key) == getattr(getattr(llama, part), key), key
    assert ours.normalizer_spec.name == llama.normalizer_spec.name == "identity"
    assert [p.piece for p in ours.pieces[:259]] == [p.piece for p in llama.pieces[:259]]
    assert [p.type for p in ours.pieces[:259]] == [p.type for p in llama.pieces[:259]]


def test_trained_model_learns_indentation_and_splits_digits(tokenizer_model):
    tokenizer = Tokenizer.load(tokenizer_model)
    pieces = {p.piece for p in parse(tokenizer_model.read_bytes()).pieces}
    assert "▁▁▁▁" in pieces
    assert not [p for p in pieces if sum(c.isdigit() for c in p) > 1 and not p.startswith("<0x")]
    text = "def f():\n        return 1\n\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_only_newlines_end_lines():
    assert list(lines(["a;\r\n    b\x0c\u2028c\n\n", "", "d"])) == ["a;\r", "    b\x0c\u2028c", "d"]


def test_lines_that_are_too_long_are_cut_and_every_byte_is_accounted_for():
    words = " ".join(f"word{number}" for number in range(20_000))
    cases = {
        "x" * 65_536: ["x" * 65_536],
        "y" * 65_537: ["y" * 65_536, "y"],
        "é" * 40_000: ["é" * 32_768, "é" * 7_232],
        "a" + "世" * 30_000: ["a" + "世" * 21_845, "世" * 8_155],
        "x" * 65_536 + " " + "y" * 9: ["x" * 65_536, "y" * 9],
        "x\t" + "y" * 65_535: ["x\t", "y" * 65_535],
        "x" * 65_000 + "\u3000" + "y" * 9_000: ["x" * 65_000 + "\u3000", "y" * 9_000],
        " " * 70_000: None,
        words: None,
    }
    for text, expected in cases.items():
        coverage = Coverage()
        found = list(lines([text], coverage))
        assert expected is None or found == expected
        assert " ".join(found) == text or "".join(found) == text
        assert max(len(line.encode()) for line in found) <= 65_536
        assert (coverage.read, coverage.used) == (len(text.encode()), len(text.encode()))
        assert coverage.cut_lines == (len(found) > 1)


def test_reserved_characters_and_line_ends_are_counted():
    coverage = Coverage()
    found = list(lines(["a▅b▁c\r\n\r\n\0d\te\n", "▅", "\r\r"], coverage))
    assert found == ["a", "b▁c\r", "\0d\te"]
    assert coverage.to_dict() == {
        "read": 23, "line_ends": 7, "reserved": 6, "sampled_out": 0, "cut_lines": 0, "cut_lines_bytes": 0, "used": 10,
    }  # fmt: skip


@pytest.mark.parametrize("mark", ["▅", "\0", "\t", "▁", "\ufeff"])
def test_a_line_with_a_reserved_character_is_learnt_from(mark, tmp_path):
    (tmp_path / "a.txt").write_text("plain words\n" + f"{mark}zqzqzq zqzqzq{mark}zqzqzq\n" * 50)
    train([tmp_path / "a.txt"], tmp_path / "x.model", 280)
    pieces = {p.piece for p in parse((tmp_path / "x.model").read_bytes()).pieces}
    assert any("zqzq" in piece for piece in pieces)


def test_a_document_that_is_too_long_to_read_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"word " * (4 << 20))
    with pytest.raises(DataError, match=r"no text in 0 documents \(1 records skipped: longer than 16,777,216 bytes\)"):
        train([tmp_path / "a.txt"], tmp_path / "x.model", 280)


@pytest.mark.parametrize(("text", "words"), [("▅▅\n▅", "no text in 1 documents"), ("\r\n\r", "no text in 1 documents")])
def test_nothing_to_learn_is_one_line(text, words, tmp_path):
    (tmp_path / "a.txt").write_bytes(text.encode())
    with pytest.raises(DataError, match=words):
        train([tmp_path / "a.txt"], tmp_path / "x.model", 280)


def test_the_report_says_what_was_read_used_and_left_out(tmp_path):
    rows = [{"text": "some words of prose\n" * 20}, {"text": ""}, {"text": "x" * 70_000}, {"text": "▅"}]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "in" / "README.md").write_text("about")
    found = run("train", tmp_path / "in", "--output", tmp_path / "x.model", "--vocab-size", 275, "--max-lines", 15)
    assert "bytes: 70,403 read" in found
    for words in (
        "20 line ends",
        "3 of the reserved",
        "1 lines over 65,536 bytes (70,000 bytes) were cut",
        "--max-lines",
    ):
        assert words in found
    assert "skipped: 1 records that are empty" in found
    assert "README.md" in found


def run(*arguments: object, error: type[Exception] | None = None) -> str:
    """`tinyllama tokenizer` in this process: what it printed, or its error's text."""
    from typer.testing import CliRunner

    from tinyllama.tokenizer.cli import app

    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])
    if error:
        assert isinstance(done.exception, error)
        return str(done.exception)
    assert done.exception is None, done.output
    return done.output


def test_an_existing_tokenizer_is_replaced_by_overwrite_alone(tmp_path, tokenizer_model):
    (tmp_path / "a.txt").write_text("some words of prose\n" * 20)
    model = tmp_path / "tokenizer.model"
    model.write_bytes(b"precious")
    arguments = ["train", tmp_path / "a.txt", "--output", model, "--vocab-size", 275]
    assert "tokenizer.model exists; give another --output, or --overwrite" in run(*arguments, error=DataError)
    assert model.read_bytes() == b"precious"
    run(*arguments, "--overwrite")
    assert Tokenizer.load(model).vocab_size == 275
    assert "would replace the input" in run(*arguments[:2], *arguments[4:], "--output", tmp_path / "a.txt", "--overwrite",
                                            error=DataError)  # fmt: skip
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "tokenizer.json").write_text("precious")
    assert "tokenizer.json exists" in run("export", tokenizer_model, "--output", tmp_path / "hf", error=DataError)
    assert (tmp_path / "hf" / "tokenizer.json").read_text() == "precious"


HELD = """
import os, signal, sys
if any("tokenizer.learner" in argument for argument in sys.orig_argv):
    sys.addaudithook(lambda event, arguments: event == "import" and arguments[0] == "sentencepiece" and
                     os.kill(os.getpid(), signal.SIGSTOP))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_learner_ends_with_its_command_and_leaves_nothing(number, tmp_path):
    """Held where it would load SentencePiece, so that it cannot be done before the signal comes."""
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "sitecustomize.py").write_text(HELD)
    (tmp_path / "a.txt").write_text("some words of prose\n" * 20)
    command = [
        sys.executable,
        "-m",
        "tinyllama",
        "tokenizer",
        "train",
        tmp_path / "a.txt",
        "--output",
        tmp_path / "x.model",
    ]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'held'}:{os.environ.get('PYTHONPATH', '')}"}
    process = subprocess.Popen(
        [*map(str, command), "--vocab-size", "275"], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )
    learner = None
    try:
        while learner is None:
            assert process.poll() is None
            children = psutil.Process(process.pid).children()
            learner = next((child for child in children if child.status() == psutil.STATUS_STOPPED), None)
            time.sleep(0.02)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        deadline = time.monotonic() + 60
        while start_ticks(learner.pid) is not None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert start_ticks(learner.pid) is None
    finally:
        process.kill()
        if learner is not None and start_ticks(learner.pid) is not None:
            learner.kill()
    killed = number == signal.SIGKILL
    assert process.returncode == (-number if killed else 128 + number)
    assert "Traceback" not in errors
    left = [".x.model.lock"] if killed else []  # an empty file, which no process holds
    assert sorted(path.name for path in tmp_path.iterdir()) == [*left, "a.txt", "held"]


def test_a_learner_that_is_killed_is_one_line(tmp_path, monkeypatch):
    from tinyllama.tokenizer import learner

    monkeypatch.setattr(learner.sys, "executable", str(tmp_path / "killed"))
    (tmp_path / "killed").write_text("#!/bin/sh\nkill -KILL $$\n")
    (tmp_path / "killed").chmod(0o755)
    (tmp_path / "a.txt").write_text("some words of prose\n" * 20)
    with pytest.raises(UserError, match=r"was killed, by the system if memory ran out.*--max-lines"):
        train([tmp_path / "a.txt"], tmp_path / "x.model", 275)


def test_samples_are_uniform_and_depend_on_the_seed_alone():
    items = [str(i) for i in range(50)]
    assert sample(items, 50, 0) == sample(items, 99, 1) == items
    assert sample(items, 5, 1) == sample(iter(items), 5, 1) != sample(items, 5, 2)
    counts = dict.fromkeys(items, 0)
    for seed in range(4000):
        for item in sample(items, 5, seed):
            counts[item] += 1
    # Each is expected 400 times with a standard deviation of 19.
    assert all(300 < count < 500 for count in counts.values())


def test_training_on_a_sample_follows_the_seed(corpus, tmp_path):
    made = [
        train([corpus], tmp_path / str(i), 500, input_sentence_size=1000, seed=seed, num_threads=threads)
        for i, (seed, threads) in enumerate([(1, 1), (1, 2), (2, 1)])
    ]
    assert made[0]["lines"] == 1000
    assert made[0]["sha256"] == made[1]["sha256"] != made[2]["sha256"]
    assert {p.name for p in tmp_path.iterdir()} == {"0", "1", "2"}


def test_kinds_of_input_give_the_same_model(tmp_path):
    texts = [p.read_text("utf-8") for p in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:15]]
    folder = tmp_path / "files"
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number:02}.py").write_bytes(text.encode())
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as stream:
        stream.writelines(json.dumps({"content": t}) + "\n" for t in texts)
    inputs = [folder, tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"]
    assert len({train([i], tmp_path / "x.model", 500)["sha256"] for i in inputs}) == 1


def test_training_is_deterministic(corpus, tokenizer_model, tmp_path):
    again = tmp_path / "[bold]again.model"  # brackets are markup to the library that prints
    done = tinyllama("tokenizer", "train", corpus, "--output", again, "--vocab-size", 600, "--threads", 1)
    assert str(again) in done.stdout
    assert again.read_bytes() == tokenizer_model.read_bytes()


def test_sizes_that_do_not_fit_name_the_bound_that_does(tmp_path):
    characters = "".join(chr(0x4E00 + i) for i in range(500))
    (tmp_path / "a.txt").write_text("\n".join([characters] * 3))
    with pytest.raises(UserError, match=r"too small.*at least (\d+)") as small:
        train([tmp_path / "a.txt"], tmp_path / "x.model", 400)
    least = int(str(small.value).split()[-1])
    assert train([tmp_path / "a.txt"], tmp_path / "x.model", least)["vocab_size"] == least
    (tmp_path / "b.txt").write_text("hello world\n" * 10)
    with pytest.raises(UserError, match=r"too large.*at most (\d+)") as large:
        train([tmp_path / "b.txt"], tmp_path / "y.model", 9999)
    most = int(str(large.value).split()[-1])
    assert train([tmp_path / "b.txt"], tmp_path / "y.model", most)["vocab_size"] == most


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"text": "fine"}\n{"text": broken\n', "bad.jsonl:2 is not valid JSON"),
        ('{"other": 1}\n', "bad.jsonl:1 has no text or content"),
        ('{"text": "\\n\\n"}\n', "no text in 1 documents"),
        ('{"text": "a\\ud800b"}\n', "bad.jsonl:1 has a lone surrogate U\\+D800 at character 1"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(content, words, tmp_path):
    """Errors while reading are the reader's own, not SentencePiece's about the vocabulary."""
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=words):
        train([path], tmp_path / "x.model", 400)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.jsonl"]
