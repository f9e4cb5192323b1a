"""Bits per byte are counted over the bytes of the windows that were scored: against the text itself."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from conftest import preparing, tinyllama

from tinyllama.data.loader import HeldOut, Source
from tinyllama.data.prepare import prepare
from tinyllama.tokenizer.sentencepiece_model import Tokenizer
from train.text_bytes import TextBytes
from train.validation import validate

ODD = (
    "a b",
    " leads",
    "  two",
    "trails \n",
    "日本語テキスト",
    "\U0001f999\u0301 x\ty",
    "\x00\x01",
    "naïve café",
    "x" * 300,
)


def held_out(store: Path, length: int) -> HeldOut:
    return HeldOut(Source("s", store, 1.0), length)


def offsets(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Bytes of `text` up to and with each of its tokens, as SentencePiece's own alignment has them."""
    pieces = tokenizer._processor.encode(text, out_type="proto").pieces
    ends = [piece.end for piece in pieces]
    assert [piece.id for piece in pieces] == tokenizer.encode(text)
    assert ends[-1] == len(text.encode())
    return np.array(ends)


@pytest.fixture(scope="module")
def odd_store(tmp_path_factory, tokenizer) -> Path:
    """A store, half held out: documents short and long, with spaces at their ends, and with characters without a piece."""
    folder = tmp_path_factory.mktemp("odd")
    rows = [text + str(number) for number in range(40) for text in ODD]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    prepare([folder / "rows.jsonl"], folder / "store", tokenizer, validation_fraction=0.5, workers=0)
    return folder / "store"


@pytest.mark.parametrize("length", [7, 64])
def test_the_bytes_of_some_windows_are_those_of_their_text(odd_store, stores, tokenizer, length):
    for store in (odd_store, stores / "prose", stores / "code"):
        source = held_out(store, length)
        texts = [tokenizer.decode(document[1:].tolist()) for document in source.store.documents()]
        assert sum(len(text.encode()) for text in texts) == source.bytes_of_text  # nothing is lost
        ends, before = [], 0
        for text in texts:  # of the separator, and of each token
            ends += [before, *(before + offsets(tokenizer, text)).tolist()]
            before += len(text.encode())
        counted = TextBytes(tokenizer.path)
        for windows in {1, 2, 3, source.num_windows // 2, source.num_windows - 1, source.num_windows, 10**6}:
            last = min(windows * length, len(ends) - 1)
            inside = source.store.read(last, 1)[0]
            slack = 3 if tokenizer.pieces()[int(inside)][1] == 6 else 0  # between the bytes of one character
            assert abs(counted.of(source, windows) - ends[last]) <= slack, (store, windows)


def test_without_a_tokenizer_only_the_whole_split_is_known(odd_store):
    source = held_out(odd_store, 64)
    assert TextBytes(None).of(source, source.num_windows) == source.bytes_of_text
    assert TextBytes(None).of(source, source.num_windows - 1) is None


def test_a_tokenizer_that_changes_text_is_scaled_to_the_split(tmp_path, corpus):
    model = tmp_path / "unigram.model"
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus / "prose.jsonl"), model_prefix=str(model.with_suffix("")), vocab_size=300, model_type="unigram",
        normalization_rule_name="nmt_nfkc", minloglevel=2, max_sentence_length=10**6, character_coverage=0.99,
    )  # fmt: skip
    tinyllama(*preparing(corpus / "prose.jsonl", tmp_path / "store", model), "--validation-fraction", "0.2")
    source, counted = held_out(tmp_path / "store", 64), TextBytes(model)
    assert counted.of(source, source.num_windows) == source.bytes_of_text
    nearly = counted.of(source, source.num_windows - 1)
    assert nearly < source.bytes_of_text
    assert nearly == pytest.approx(source.bytes_of_text, rel=0.01)


def test_a_uniform_model_has_its_bits_on_those_bytes(odd_store, tokenizer, monkeypatch):
    """A model that guesses has log2(V) bits a target; per byte, over those of the scored windows alone."""
    source, windows = held_out(odd_store, 16), 5
    targets = windows * 16
    monkeypatch.setattr("train.validation.held_out_loss", lambda *_, **__: (targets * math.log(600), targets))
    counted = TextBytes(tokenizer.path)
    (result,) = validate(None, [source], windows, counted).values()
    assert result["bits_per_byte"] == pytest.approx(targets * math.log2(600) / counted.of(source, windows))
    (unknown,) = validate(None, [source], windows, TextBytes(None)).values()
    assert unknown["bits_per_byte"] is None
