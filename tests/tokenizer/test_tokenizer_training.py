"""Tokenizers trained here: Llama's settings, and the same model from the same text."""

from __future__ import annotations

import gzip
import json
import sysconfig
from pathlib import Path

import pytest
from conftest import LLAMA2, tinyllama

from tinyllama.errors import DataError, UserError
from tinyllama.tokenizer.sentencepiece_model import Tokenizer, parse
from tinyllama.tokenizer.train import LLAMA_SETTINGS, lines, sample, train


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
    assert list(lines(["x" * 65_536 + "\n" + "y" * 65_537, "é" * 40_000])) == ["x" * 65_536]


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
