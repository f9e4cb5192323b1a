"""Llama's settings, and exported ids that equal SentencePiece's on everything."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pytest
from conftest import SHARED, tinyllama
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllama.errors import UserError
from tinyllama.tokenizer.export import export_hf, merges, verify_hf
from tinyllama.tokenizer.sentencepiece_model import Tokenizer
from tinyllama.tokenizer.train import LLAMA_SETTINGS

LLAMA2 = SHARED / "tokenizer" / "llama2" / "tokenizer.model"


def standard_library() -> list[str]:
    """Every .py file of the standard library that is UTF-8, its tests included."""
    texts = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" not in path.parts:
            try:
                texts.append(path.read_bytes().decode("utf-8"))
            except UnicodeDecodeError:
                continue
    return texts


@pytest.fixture(scope="module", params=["llama2", "trained"])
def pair(request, tokenizer_model, tmp_path_factory):
    """(tokenizer.model, its export) of Llama 2's real tokenizer, and of one trained here."""
    if request.param == "llama2" and not LLAMA2.exists():
        pytest.skip("Llama 2's tokenizer.model is not part of this project (../shared/tokenizer is absent)")
    model = LLAMA2 if request.param == "llama2" else tokenizer_model
    target = tmp_path_factory.mktemp("hf") / request.param
    report = export_hf(model, target)
    assert report["checked"]["texts"] > 800
    return model, target


@pytest.fixture(scope="module")
def both(pair):
    from transformers import AutoTokenizer

    return Tokenizer.load(pair[0]), AutoTokenizer.from_pretrained(pair[1])


def test_ids_are_equal_on_every_file_of_the_standard_library(pair):
    texts = standard_library()
    assert len(texts) > 1000
    counts = verify_hf(pair[1], pair[0], texts)
    assert counts["texts"] == len(texts)
    assert counts["mismatches"] == 0, counts["first"][:200]


@given(st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=200), min_size=1, max_size=8))
@settings(max_examples=150, deadline=None)
def test_ids_are_equal_and_text_comes_back_on_random_unicode(both, texts):
    ours, theirs = both
    for text in texts:
        ids = ours.encode(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert theirs(text)["input_ids"] == [ours.bos_id, *ids]
        assert theirs.decode(ids) == ours.decode(ids)


@given(st.text(alphabet=" \n\tab=-_▁<s>/0", max_size=120))
@settings(max_examples=300, deadline=None)
def test_ids_are_equal_on_runs_and_repetitions(both, text):
    ours, theirs = both
    assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)


def test_special_tokens_are_known(both):
    ours, theirs = both
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (1, 2, 0)
    assert len(theirs) == ours.vocab_size
    # In a document "<s>" is three characters, not the start of another one.
    assert 1 not in theirs("a <s> b", add_special_tokens=False)["input_ids"]


def test_the_naive_order_of_merges_would_be_wrong(tokenizer_model):
    """What this module avoids: merges in vocabulary order, as transformers derives them."""
    run = "▁"
    pieces = [
        (run * 2, -1e9, 1),
        (run * 4, -1e9, 1),
        ("▁t", -1.0, 1),
        (run * 3, -1e9, 1),
        (run, -1e9, 1),
        ("t", -5.0, 1),
    ]
    assert merges(pieces) == [
        ("▁", "t"),
        (run * 3, run),
        (run * 2, run * 2),
        (run, run * 3),
        (run * 2, run),
        (run, run * 2),
        (run, run),
    ]


def spec(path: Path):
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(path.read_bytes())
    return proto


def test_trained_models_have_llamas_settings(tokenizer_model):
    if not LLAMA2.exists():
        pytest.skip("Llama 2's tokenizer.model is not part of this project (../shared/tokenizer is absent)")
    ours, llama = spec(tokenizer_model), spec(LLAMA2)
    for key in LLAMA_SETTINGS:
        for part in ("trainer_spec", "normalizer_spec"):
            if hasattr(getattr(llama, part), key):
                assert getattr(getattr(ours, part), key) == getattr(getattr(llama, part), key), key
    assert ours.normalizer_spec.name == llama.normalizer_spec.name == "identity"
    assert [p.piece for p in ours.pieces[:259]] == [p.piece for p in llama.pieces[:259]]
    assert [p.type for p in ours.pieces[:259]] == [p.type for p in llama.pieces[:259]]


def test_trained_model_learns_indentation_and_splits_digits(tokenizer_model):
    tokenizer = Tokenizer.load(tokenizer_model)
    pieces = {p.piece for p in spec(tokenizer_model).pieces}
    assert "▁▁▁▁" in pieces
    assert not [p for p in pieces if sum(c.isdigit() for c in p) > 1 and not p.startswith("<0x")]
    text = "def f():\n        return 1\n\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_training_is_deterministic(corpus, tokenizer_model, tmp_path):
    again = tmp_path / "again.model"
    tinyllama("tokenizer", "train", corpus, "--output", again, "--vocab-size", 600, "--threads", 1)
    assert again.read_bytes() == tokenizer_model.read_bytes()


def test_export_command(tokenizer_model, tmp_path):
    done = tinyllama("tokenizer", "export", tokenizer_model, "--output", tmp_path / "hf", "--json")
    assert json.loads(done.stdout)["vocab_size"] == 600
    assert {p.name for p in (tmp_path / "hf").iterdir()} >= {
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "{corpus}", "--output", "x.model", "--vocab-size", "100000"], "at most"),
        (["train", "{corpus}", "--output", "x.model", "--vocab-size", "10"], "300 or more"),
        (["train", "missing", "--output", "x.model"], "missing does not exist"),
        (["export", "missing.model", "--output", "hf"], "missing.model does not exist"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(arguments, words, corpus, tmp_path):
    from conftest import ROOT

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


def test_models_of_another_kind_are_refused(corpus, tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus / "prose.jsonl"), model_prefix=str(tmp_path / "unigram"), vocab_size=300,
        model_type="unigram", minloglevel=2,
    )  # fmt: skip
    with pytest.raises(UserError, match="not a BPE model"):
        export_hf(tmp_path / "unigram.model", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
