"""The cached encoder gives SentencePiece's ids on everything, and takes no cut that a vocabulary contradicts."""

from __future__ import annotations

import ast
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from conftest import LLAMA2
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllama.tokenizer import cached
from tinyllama.tokenizer.cached import CachedEncoder, find_cut
from tinyllama.tokenizer.sentencepiece_model import NORMAL, Tokenizer


@pytest.fixture(scope="module", params=["trained", "llama2"])
def tokenizer(request: pytest.FixtureRequest, tokenizer_model: Path) -> Tokenizer:
    if request.param == "llama2" and not LLAMA2.exists():
        pytest.skip(f"{LLAMA2} is not there")
    return Tokenizer.load(LLAMA2 if request.param == "llama2" else tokenizer_model)


def ids(encoder: CachedEncoder, text: str) -> list[int]:
    return np.frombuffer(encoder.encode(text), dtype=encoder.dtype).tolist()


def test_ids_are_equal_on_the_standard_library(tokenizer):
    encoder = CachedEncoder(tokenizer, "<u2")
    assert encoder.pattern is not None
    assert encoder.pattern.pattern == cached.CUTS[0]
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_bytes().decode()
        assert ids(encoder, text) == tokenizer.encode(text), path
        prose = ast.get_docstring(ast.parse(text)) or ""
        assert ids(encoder, prose) == tokenizer.encode(prose), path


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_ids_are_equal_on_random_text(tokenizer, data):
    pieces = [*"aZ09 .;('\"\\_\n\r\t▁é世🙂\u0301\u200d\0²”", "  ", " a", "the", "<s>", "\n    ", "▁▁"]
    # As lists: in one alphabet with all of Unicode, these would hardly ever be drawn.
    mixed = st.lists(
        st.one_of(st.sampled_from(pieces), st.text(st.characters(codec="utf-8"), max_size=3)), max_size=60
    ).map("".join)
    encoder = CachedEncoder(tokenizer, "<u2")
    for text in data.draw(st.lists(mixed, max_size=4)):
        assert ids(encoder, text) == tokenizer.encode(text)


def test_ids_are_equal_with_a_full_cache_and_long_texts(tokenizer, monkeypatch):
    monkeypatch.setattr(cached, "MAX_WORDS", 50)
    monkeypatch.setattr(cached, "SLICE_CHARACTERS", 100)
    encoder = CachedEncoder(tokenizer, "<u4")
    text = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_text() + "é" * 500 + "x" * 500 + "\n\n" * 300
    assert ids(encoder, text) == tokenizer.encode(text)
    assert ids(encoder, text[::-1]) == tokenizer.encode(text[::-1])


@pytest.mark.parametrize(
    ("pieces", "cut"),
    [
        (["▁the", "();", "▁▁▁", "7", "ü", "”."], 0),
        (["a."], 1),
        (["12"], 1),
        (["(é"], 0),
        (["a.é"], 1),
        (["the▁cat"], None),
        (["\n\n"], None),
        ([";\n"], None),
    ],
)
def test_no_cut_goes_through_a_piece(pieces, cut):
    found = find_cut([(piece, NORMAL) for piece in pieces])
    assert (found.pattern if found else None) == (None if cut is None else cached.CUTS[cut])


def test_vocabularies_with_other_pieces_are_left_to_sentencepiece(tokenizer, monkeypatch):
    assert find_cut([("<user>", 4)]) is None
    monkeypatch.setattr(Tokenizer, "is_llama_like", False)
    encoder = CachedEncoder(tokenizer, "<u2")
    assert encoder.pattern is None
    assert ids(encoder, "for x in y:\n    pass") == tokenizer.encode("for x in y:\n    pass")
