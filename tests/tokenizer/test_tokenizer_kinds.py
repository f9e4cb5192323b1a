"""Tokenizers that are not quite Llama's: exported with exactly SentencePiece's ids, or refused with one reason, in time."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SHARED
from conftest import settings as recipe_settings
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinyllama.data.prepare import prepare
from tinyllama.errors import UserError
from tinyllama.tokenizer.export import export_hf, piece_texts, short_texts, tokenizer_json, why_not
from tinyllama.tokenizer.sentencepiece_model import Tokenizer
from tinyllama.tokenizer.train import LLAMA_SETTINGS

EXPRESSED: dict[str, dict[str, Any]] = {
    "extra spaces removed": {"remove_extra_whitespaces": True},
    "no space before": {"add_dummy_prefix": False},
    "both": {"remove_extra_whitespaces": True, "add_dummy_prefix": False},
    "no bytes": {"byte_fallback": False},
    "no bytes, extra spaces removed": {"byte_fallback": False, "remove_extra_whitespaces": True},
    "padding and control pieces": {"pad_id": 3, "control_symbols": ["<c>"]},
    "other names": {"unk_piece": "[UNK]", "bos_piece": "[B]", "eos_piece": "[E]", "remove_extra_whitespaces": True},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nmt_nfkc": ({"normalization_rule_name": "nmt_nfkc"}, r"normalized by nmt_nfkc .* gives other ids .* such as"),
    "unigram": ({"model_type": "unigram"}, "as unigram .* gives other ids"),
    "user": ({"user_defined_symbols": ["<|x|>"]}, r"user-defined pieces, such as '<\|x\|>'"),
    "suffix": ({"treat_whitespace_as_suffix": True}, "puts spaces behind words"),
    "word": ({"model_type": "word", "byte_fallback": False}, "neither a BPE nor a unigram"),
}


@pytest.fixture(scope="module")
def make(corpus, tmp_path_factory) -> Callable[[dict[str, Any]], Path]:
    """A tokenizer.model of 400 pieces with settings of its own."""
    import sentencepiece

    lines = [json.loads(line)["text"] for line in (corpus / "prose.jsonl").read_text().splitlines()[:40]]
    texts = [line for text in lines for line in text.split("\n") if line] + ["naïve ½ ﬁne １２ 日本 ▁ <s>"] * 20
    folder, made = tmp_path_factory.mktemp("kinds"), {}

    def of(changes: dict[str, Any]) -> Path:
        if (key := json.dumps(changes)) not in made:
            model = io.BytesIO()
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts), model_writer=model, minloglevel=2, num_threads=1,
                **{**LLAMA_SETTINGS, "vocab_size": 450, **changes},
            )  # fmt: skip
            made[key] = folder / f"{len(made)}.model"
            made[key].write_bytes(model.getvalue())
        return made[key]

    return of


def both(path: Path) -> tuple[Tokenizer, Any]:
    from tokenizers import Tokenizer as Backend

    theirs = Backend.from_str(json.dumps(tokenizer_json(path)))
    theirs.encode_special_tokens = True
    return Tokenizer.load(path), theirs


@pytest.mark.parametrize("name", EXPRESSED)
def test_what_hugging_face_can_express_has_sentencepieces_ids(make, name):
    path = make(EXPRESSED[name])
    assert why_not(path) is None
    ours, theirs = both(path)
    texts = [*short_texts(7), *piece_texts([piece for piece, _ in ours.pieces()], 7)]
    assert len(texts) > 1000
    found = theirs.encode_batch(texts, add_special_tokens=False)
    for text, want, got in zip(texts, ours.encode_batch(texts, 1), found, strict=True):
        assert got.ids == want, text
        if ours.unk_id not in want:
            assert theirs.decode(want) == ours.decode(want), text


@pytest.mark.parametrize("name", EXPRESSED)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.text(" ▁\n\r\tab<s>é½", max_size=60),
        min_size=1,
        max_size=20,
    )
)
def test_random_texts_have_sentencepieces_ids(make, name, texts):
    ours, theirs = both(make(EXPRESSED[name]))
    for text in texts:
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text)


def test_an_export_of_another_kind_is_whole(make, tmp_path):
    from transformers import AutoTokenizer

    model = make(EXPRESSED["other names"])
    report = export_hf(model, tmp_path / "hf")
    assert report["checked"]["texts"] > 1400
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (theirs.unk_token, theirs.bos_token, theirs.eos_token) == ("[UNK]", "[B]", "[E]")
    assert theirs("  a  [B] ")["input_ids"] == [theirs.bos_token_id, *Tokenizer.load(model).encode("a [B]")]


def test_the_case_of_removed_spaces(tmp_path):
    model = SHARED / "cases" / "tokenizers" / "remove-extra-whitespaces.model"
    if not model.exists():
        pytest.skip("../shared/cases is absent")
    assert why_not(model) is None
    assert export_hf(model, tmp_path / "hf")["vocab_size"] == 512


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_express_is_refused_with_its_reason(make, name, tmp_path):
    changes, words = REFUSED[name]
    model = make(changes)
    with pytest.raises(UserError, match=words) as error:
        export_hf(model, tmp_path / "hf")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_it_is_said_by_prepare_and_refused_before_a_launch(make, tmp_path):
    import typer
    from typer.testing import CliRunner

    from train.cli import train_command

    model = make(REFUSED["nmt_nfkc"][0])
    lines = (json.dumps({"text": f"some words of prose, number {n}, again and again\n" * 9}) for n in range(200))
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    said: list[str] = []
    tokenizer = Tokenizer.load(model)
    prepare(
        [tmp_path / "a.jsonl"],
        tmp_path / "data" / "a",
        tokenizer,
        workers=0,
        validation_fraction=0.1,
        notice=said.append,
    )
    assert "could be neither exported nor evaluated (as BPE, normalized by nmt_nfkc" in said[0]
    app = typer.Typer()
    app.command()(train_command)
    source = '[{"name": "a", "weight": 1}]'
    more = ["model.vocab_size=450", f"data.sources={source}", "training.tokens=3840"]
    arguments = ["--recipe", "demo", "--data", str(tmp_path / "data"), "--output", str(tmp_path / "run")]
    for dry in ([], ["--dry-run"]):
        given = [*arguments, *recipe_settings(*more), "--num-accelerators", "1", *dry]
        found = CliRunner().invoke(app, given).exception
        assert isinstance(found, UserError)
        assert "neither exported nor evaluated" in str(found)
        assert "--any-tokenizer" in str(found)
    assert not list((tmp_path / "run").glob("**/*.pt"))
    shutil.rmtree(tmp_path / "data")
