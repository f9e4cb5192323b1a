"""Texts are tokenized many at once and templates compiled once: what lm-eval gets must be what it would have made itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import random_llama

from evalsuite import counting, runner
from evalsuite.counting import CountingHFLM

TEXTS = ["The cat", "The cat ", "A longer text of several words\n\n", "The cat", "  ", "één ünïcode 猫", "x" * 300]
ANSWERS = [" sat", " sat", "on", "", " 猫", "\n"]


@pytest.fixture(scope="module", params=[None, True, False])
def models(request, tmp_path_factory):
    """lm-eval's backend and ours, with each way of asking for a bos token."""
    from lm_eval.models.huggingface import HFLM

    directory = random_llama.build(tmp_path_factory.mktemp("llama") / "model")
    settings = {"pretrained": str(directory), "device": "cpu", "add_bos_token": request.param}
    return HFLM(**settings), CountingHFLM(**settings)


def encoded(model, pairs) -> list:
    """What the model would score."""
    found = []
    model._loglikelihood_tokens = lambda requests, **_: found.extend(requests)
    try:
        model.loglikelihood([SimpleNamespace(args=pair) for pair in pairs], disable_tqdm=True)
    finally:
        del model._loglikelihood_tokens
    return found


@pytest.mark.parametrize("together", [1, 5, 1000])
def test_ids_are_those_of_lm_eval(models, together, monkeypatch):
    theirs, ours = models
    monkeypatch.setattr(counting, "TOGETHER", together)
    bos = theirs.tokenizer.decode(theirs.prefix_token_id)
    texts = [*TEXTS, bos + "begins with bos", "", "The cat"]
    pairs = [(text, answer) for text in texts for answer in ANSWERS if text or answer]
    assert encoded(ours, pairs) == encoded(theirs, pairs)
    assert ours.tok_encode("The cat") == theirs.tok_encode("The cat")
    assert ours.tok_encode("The cat", left_truncate_len=1) == theirs.tok_encode("The cat", left_truncate_len=1)


def test_each_text_is_tokenized_once(models, monkeypatch):
    _, ours = models
    texts: list[str] = []
    whole = type(ours.tokenizer).__call__

    def watched(tokenizer, text, *args, **kwargs):
        texts.extend(text)
        return whole(tokenizer, text, *args, **kwargs)

    monkeypatch.setattr(type(ours.tokenizer), "__call__", watched)
    monkeypatch.setattr(ours.tokenizer, "encode", lambda *_, **__: pytest.fail("a text was tokenized by itself"))
    encoded(ours, [(text, answer) for text in ("one text", "another") for answer in (" a", " b", " c")])
    assert len(texts) == len(set(texts)) == 8


def test_a_failure_leaves_nothing_behind(models, monkeypatch):
    theirs, ours = models
    with monkeypatch.context() as patch:
        patch.setattr(type(ours.tokenizer), "__call__", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            encoded(ours, [("one text", " a")])
    assert ours.tok_encode("one text") == theirs.tok_encode("one text")
    assert encoded(ours, [("one text", " b")]) == encoded(theirs, [("one text", " b")])


def test_a_template_is_compiled_once(monkeypatch):
    from lm_eval import utils

    env = utils.Environment(loader=utils.BaseLoader, undefined=utils.StrictUndefined, keep_trailing_newline=True)
    env.filters["regex_replace"] = utils.regex_replace
    compiled = []
    plain = env.compile
    env.compile = lambda *args, **kwargs: compiled.append(args) or plain(*args, **kwargs)
    monkeypatch.setattr(utils, "env", env)
    runner.compile_templates_once()
    runner.compile_templates_once()
    template = "{{question | regex_replace('a', 'b')}} {{choices[answer]}}\n"
    documents = [{"question": f"a{n}", "choices": ["x", "y"], "answer": n % 2} for n in range(9)]
    found = [utils.apply_template(template, document) for document in documents]
    assert found == [f"b{n} {'xy'[n % 2]}\n" for n in range(9)]
    assert len(compiled) == 1
