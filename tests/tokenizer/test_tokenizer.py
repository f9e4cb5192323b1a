"""A tokenizer.model that is missing, broken or given what it cannot encode, and the mistakes of its commands."""

from __future__ import annotations

import pytest
from conftest import ROOT, tinyllama

from tinyllama.errors import DataError, UserError
from tinyllama.tokenizer.sentencepiece_model import Tokenizer


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "{corpus}", "--output", "x.model", "--vocab-size", "100000"], "at most"),
        (["train", "{corpus}", "--output", "x.model", "--vocab-size", "10"], "260 or more"),
        (["train", "{corpus}", "--output", "x.model", "--vocab-size", "99999999999"], "99999999999"),
        (["train", "{corpus}", "--output", "x.model", "--threads", "0"], "--threads 0"),
        (["train", "{corpus}", "--output", "{corpus}/prose.jsonl/x.model"], "prose.jsonl"),
        (["train", "missing", "--output", "x.model"], "missing does not exist"),
        (["export", "missing.model", "--output", "hf"], "missing.model does not exist"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(arguments, words, corpus, tmp_path):
    filled = [a.format(corpus=corpus) for a in arguments]
    done = tinyllama("tokenizer", *filled, check=False, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 2
    assert words in done.stderr
    assert len([line for line in done.stderr.splitlines() if "error:" in line]) == 1
    assert not list(tmp_path.iterdir())


def test_a_broken_model_is_named(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        Tokenizer.load(tmp_path)


def test_lone_surrogates_are_named(tokenizer_model):
    tokenizer = Tokenizer.load(tokenizer_model)
    for encode in (lambda: tokenizer.encode("ab\udfff"), lambda: tokenizer.encode_batch(["fine", "ab\udfff"], 2)):
        with pytest.raises(DataError, match="U\\+DFFF at character 2"):
            encode()


def test_truncated_and_missing_models_are_named(tokenizer_model, tmp_path):
    content = tokenizer_model.read_bytes()
    for size in (0, 10, len(content) // 2, len(content) - 1):
        (tmp_path / "tokenizer.model").write_bytes(content[:size])
        with pytest.raises(UserError, match=r"tokenizer\.model is (empty|not a SentencePiece model)"):
            Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        Tokenizer.load(tmp_path / "absent")
