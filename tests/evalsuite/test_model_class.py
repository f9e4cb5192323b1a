"""What lm-eval's tests ask of a model class (tests/models/test_huggingface.py there), asked of ours beside its own HFLM."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import pytest
import random_llama
import torch
from random_llama import asked

from evalsuite import backends

CONTEXT = 128
QUESTION = "Question: which of these is a function?\nAnswer:"
LONG = "def capwords(s, sep=None):\n    return (sep or ' ').join(x.capitalize() for x in s.split(sep))\n" * 6
PAIRS = [
    (QUESTION, " print"),
    (QUESTION, " template"),
    (QUESTION, " class"),
    (QUESTION + " ", "print"),  # the blank goes over to the continuation
    (LONG, " class"),  # its beginning goes
    (LONG, "\n" + LONG[:60]),
    ("", "def f(self):"),  # after the prefix token
    ("", "<s>def f(self):"),  # which is there already
    ("<s>" + QUESTION, " print"),
    ("猫 🙂 é\n", "naïve — 東京"),
    (QUESTION, " print"),
]
WHOLE = ["", "a", "def f(self):\n", LONG, LONG + "猫 🙂", "<s>" + LONG[:50], LONG[:50]]
PROMPTS = ["def ", "class Formatter:\n    def ", LONG, "<s>return ", "猫", "Stop here: STOP and\n\n", "def "]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["native", "native-bos", "hf", "hf-bos"])
def models(request, tmp_path_factory) -> tuple[Any, Any]:
    """lm-eval's HFLM, and ours of the same files: native or hf, of a tokenizer that adds a bos token or none."""
    from lm_eval.models.huggingface import HFLM

    backend, _, bos = request.param.partition("-")
    directory = str(random_llama.build(tmp_path_factory.mktemp("llama") / "model", CONTEXT, bos=bool(bos)))
    ours = backends.make(backends.choose(directory, backend, "float32", 4, None), tmp_path_factory.mktemp("log"))
    return HFLM(pretrained=directory, device="cpu", dtype="float32", batch_size=1), ours


def each(model: Any, kind: str, arguments: list[Any]) -> list[Any]:
    return [getattr(model, kind)(asked(kind, [one]), disable_tqdm=True)[0] for one in arguments]


def close(found: list[tuple[float, bool]], expected: list[tuple[float, bool]]) -> None:
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_log_likelihoods(models):
    theirs, ours = models
    before = ours.num_truncated
    close(ours.loglikelihood(asked("loglikelihood", PAIRS)), each(theirs, "loglikelihood", PAIRS))
    assert ours.num_truncated - before == 2


def test_a_most_likely_continuation_is_greedy(models):
    theirs, ours = models
    text = each(theirs, "generate_until", [(QUESTION, {"max_gen_toks": 4, "until": []})])[0]
    found = ours.loglikelihood(asked("loglikelihood", [(QUESTION, text), (QUESTION, " print")]))
    close(found, each(theirs, "loglikelihood", [(QUESTION, text), (QUESTION, " print")]))


def test_rolling_log_likelihoods(models):
    theirs, ours = models
    found = ours.loglikelihood_rolling(asked("loglikelihood_rolling", [(text,) for text in WHOLE]))
    assert found == pytest.approx(each(theirs, "loglikelihood_rolling", [(text,) for text in WHOLE]), abs=2e-4)
    assert found[0] <= 0
    # The windows have every token once, whatever the length: 1 to 3 contexts, and one token beyond and below.
    for count in (1, CONTEXT - 1, CONTEXT, CONTEXT + 1, 2 * CONTEXT, 3 * CONTEXT - 1):
        text = ours.tok_decode([300 + n % 150 for n in range(count)])
        one = ours.loglikelihood_rolling(asked("loglikelihood_rolling", [(text,)]))
        assert one == pytest.approx(each(theirs, "loglikelihood_rolling", [(text,)]), abs=2e-4)


@pytest.mark.parametrize(
    "wanted",
    [
        {"until": ["\n\n", "STOP"], "max_gen_toks": 16, "do_sample": False},
        {"until": "e", "max_gen_toks": 16},
        {"until": ["rror", "猫", "a long stop string that never comes"], "max_new_tokens": 12, "temperature": 0.0},
        {"until": [], "max_tokens": 9},
        {"max_gen_toks": 1},
        {"until": [" "], "max_gen_toks": 100, "do_sample": False, "temperature": 0.7, "top_p": 0.9, "top_k": 5},
        {"max_gen_toks": 5, "num_beams": 1, "repetition_penalty": 1.0, "use_cache": True},
    ],
)
def test_generate_until(models, wanted):
    theirs, ours = models
    before = copy.deepcopy(wanted)
    known = {name: value for name, value in wanted.items() if name != "use_cache"}  # which HFLM gives a second time
    found = ours.generate_until(asked("generate_until", [(prompt, wanted) for prompt in PROMPTS]))
    assert found == each(theirs, "generate_until", [(prompt, known) for prompt in PROMPTS])
    assert wanted == before  # lm-eval's caches have the request for a key


def test_texts_of_different_settings_in_one_call(models):
    theirs, ours = models
    settings = [{"until": ["e"], "max_gen_toks": 12}, {"until": [], "max_gen_toks": 3}, {"until": ["\n"]}]
    arguments = [(prompt, settings[number % 3]) for number, prompt in enumerate(p for p in PROMPTS if p != LONG)]
    arguments = [(prompt, {**one, "max_gen_toks": one.get("max_gen_toks", 20)}) for prompt, one in arguments]
    assert ours.generate_until(asked("generate_until", arguments)) == each(theirs, "generate_until", arguments)


def test_numbers_mean_the_same_in_every_notation(models):
    """transformers refuses 2 where it takes 2.0, and YAML reads 1e-1 as text."""
    _, ours = models
    notations = [({"temperature": "5e-1"}, {"temperature": 0.5}), ({"temperature": 2}, {"temperature": 2.0})]
    if not hasattr(ours, "engine"):  # native has no penalties
        notations.append(({"do_sample": False, "repetition_penalty": 2}, {"repetition_penalty": 2.0}))
    for one, other in notations:
        texts = []
        for given in (one, other):
            torch.manual_seed(0)
            texts.append(ours.generate_until(asked("generate_until", [("def ", {"max_gen_toks": 6, **given})])))
        assert texts[0] == texts[1]


def test_the_order_of_requests_changes_nothing(models):
    _, ours = models
    generation = {"until": ["e"], "max_gen_toks": 8}
    expected = dict(zip(PAIRS, ours.loglikelihood(asked("loglikelihood", PAIRS)), strict=True))
    texts = dict(
        zip(PROMPTS, ours.generate_until(asked("generate_until", [(p, generation) for p in PROMPTS])), strict=True)
    )
    for seed in range(3):
        pairs, prompts = PAIRS * 2, PROMPTS * 2
        random.Random(seed).shuffle(pairs)
        random.Random(seed).shuffle(prompts)
        close(ours.loglikelihood(asked("loglikelihood", pairs)), [expected[pair] for pair in pairs])
        found = ours.generate_until(asked("generate_until", [(p, generation) for p in prompts]))
        assert found == [texts[p] for p in prompts]


def test_tokens_are_those_of_lm_eval(models):
    theirs, ours = models
    for text in [*WHOLE, "foo bar", " a", "<s>", "</s>x"]:
        for special in (None, True, False):
            assert ours.tok_encode(text, add_special_tokens=special) == theirs.tok_encode(text, special)
        assert ours.tok_encode(text, left_truncate_len=3) == theirs.tok_encode(text, left_truncate_len=3)
        ids = ours.tok_encode(text)
        for skip in (True, False):
            assert ours.tok_decode(ids, skip_special_tokens=skip) == theirs.tok_decode(ids, skip_special_tokens=skip)
    for name in ("prefix_token_id", "eot_token_id", "max_length", "max_gen_toks", "rank", "world_size"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_batches_of_tokens_are_those_of_lm_eval(models):
    theirs, ours = models
    for texts in (["foo", "foo bar template"], ["<s>foo", "<s>class x"], [LONG, "a"]):
        for cut in (None, 3):
            for mine, other in zip(
                ours.tok_batch_encode(texts, left_truncate_len=cut),
                theirs.tok_batch_encode(texts, left_truncate_len=cut),
                strict=True,
            ):
                assert mine.tolist() == other.tolist()
    # HFLM has the first text say for all whether a bos token is there: ours asks each.
    mixed = ["<s>foo", "foo bar template"]
    ids, mask = ours.tok_batch_encode(mixed)
    rows = [
        [i for i, m in zip(row, keep, strict=True) if m] for row, keep in zip(ids.tolist(), mask.tolist(), strict=True)
    ]
    assert rows == [theirs.tok_batch_encode([text])[0][0].tolist() for text in mixed]


def test_answers_are_kept_by_lm_eval_s_cache(models, tmp_path):
    """A second run asks nothing, and of a run that another item was added to only that one is asked."""
    from lm_eval.api.model import CachingLM

    _, ours = models
    generation = {"until": ["e"], "max_gen_toks": 6}
    prompts = [(prompt, generation) for prompt in dict.fromkeys(PROMPTS)]
    calls = []
    cached = CachingLM(ours, str(tmp_path / "cache.db"))
    plain = type(ours)._loglikelihood_tokens, type(ours).generate_until
    first = cached.loglikelihood(asked("loglikelihood", PAIRS)), cached.generate_until(asked("generate_until", prompts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(ours), "_loglikelihood_tokens", lambda self, r, *a, **k: (calls.append(len(r)), plain[0](self, r))[1]
        )
        patch.setattr(
            type(ours), "generate_until", lambda self, r, *a, **k: (calls.append(len(r)), plain[1](self, r))[1]
        )
        again = (
            cached.loglikelihood(asked("loglikelihood", PAIRS)),
            cached.generate_until(asked("generate_until", prompts)),
        )
        assert again == first
        assert calls == []
        more = cached.loglikelihood(asked("loglikelihood", [*PAIRS, (QUESTION, " string")]))
        assert more[:-1] == first[0]
        assert calls == [1]
        drawn = [("def ", {"max_gen_toks": 4, "do_sample": True, "temperature": 0.8})]
        cached.generate_until(asked("generate_until", drawn))
        cached.generate_until(asked("generate_until", drawn))
        assert calls == [1, 1, 1]
    ours.set_cache_hook(type(ours.cache_hook)(None))


def test_a_text_ends_after_any_of_the_model_s_ends(tmp_path):
    """generation_config.json may name several tokens, as those of chat models do."""
    from lm_eval.models.huggingface import HFLM

    directory = random_llama.build(tmp_path / "model", CONTEXT)
    plain = HFLM(pretrained=str(directory), device="cpu", dtype="float32", batch_size=1)
    wanted = {"until": [], "max_gen_toks": 12}
    text = each(plain, "generate_until", [("def ", wanted)])[0]
    (end,) = plain.tok_encode("class")
    assert "class" in text
    path = directory / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [2, end]}))
    theirs = HFLM(pretrained=str(directory), device="cpu", dtype="float32", batch_size=1)
    ours = backends.make(backends.choose(str(directory), "native", "float32", None, None), tmp_path)
    arguments = [(prompt, wanted) for prompt in PROMPTS if prompt != LONG]
    expected = each(theirs, "generate_until", arguments)
    assert ours.generate_until(asked("generate_until", arguments)) == expected
    assert len(expected[0]) < len(text)
