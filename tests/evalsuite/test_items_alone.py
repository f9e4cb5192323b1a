"""One item never moves another: what each gets is what lm-eval's hf backend says of it alone, or the item is refused."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import pytest
import random_llama
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_llama import asked

from evalsuite import backends
from evalsuite.budget import Budget
from tinyllama.errors import UserError

CONTEXT, GENERATED = 24, 6
# Beginnings and ends that merge into one token, characters of several bytes, blanks, a text beyond the context, nothing.
PIECES = [
    "class",
    "cla",
    "ss",
    " def",
    "de",
    "f",
    "self",
    " ",
    "  ",
    "\n",
    "é",
    "猫",
    "🙂",
    "def f(self):\n",
    "x=1;" * 30,
    "",
]
texts = st.lists(st.sampled_from(PIECES), max_size=4).map("".join)
short = st.lists(st.sampled_from([p for p in PIECES if len(p) < 9]), min_size=1, max_size=2).map("".join)
budgets = st.sampled_from([Budget(5, 4), Budget(64, 4, True), Budget(4096, 64)])


class Models(NamedTuple):
    """lm-eval's backend, and ours."""

    lm_eval: Any
    ours: dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "bos"])
def models(request, tmp_path_factory) -> Models:
    from lm_eval.models.huggingface import HFLM

    directory = str(random_llama.build(tmp_path_factory.mktemp("llama") / "model", CONTEXT, bos=request.param))
    ours = {
        backend: backends.make(backends.choose(directory, backend, "float32", 3, None), tmp_path_factory.mktemp("log"))
        for backend in ("native", "hf")
    }
    return Models(HFLM(pretrained=directory, device="cpu", dtype="float32", batch_size=1), ours)


def alone(model: Any, kind: str, arguments: tuple[Any, ...]) -> Any:
    """lm-eval's answer to one request by itself; None where it has none."""
    try:
        return getattr(model, kind)(asked(kind, [arguments]), disable_tqdm=True)[0]
    except (AssertionError, IndexError):
        return None


@given(st.lists(st.tuples(texts, st.one_of(short, texts)), min_size=1, max_size=10), st.integers(0, 2), budgets)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_log_probabilities_are_those_of_each_item_alone(models, pairs, again, budget):
    pairs = pairs + pairs[:again]
    expected = [alone(models.lm_eval, "loglikelihood", pair) for pair in pairs]
    good = [number for number, answer in enumerate(expected) if answer is not None]
    models.ours["native"].engine.budget = budget
    for model in models.ours.values():
        found = model.loglikelihood(asked("loglikelihood", [pairs[number] for number in good]))
        for number, (score, greedy) in zip(good, found, strict=True):
            assert score == pytest.approx(expected[number][0], abs=1e-4), pairs[number]
            assert greedy == expected[number][1]
        if len(good) < len(pairs):
            with pytest.raises(UserError, match=r"^task t, item \d+: ") as caught:
                model.loglikelihood(asked("loglikelihood", pairs))
            named = re.match(r"task t, item (\d+)", str(caught.value))
            assert named
            assert int(named[1]) not in good
            assert "\n" not in str(caught.value)


@given(st.lists(texts, min_size=1, max_size=6), st.booleans(), budgets)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_texts_are_those_of_each_prompt_alone(models, prompts, stops, budget):
    wanted = {"until": ["s", "\n"] if stops else [], "max_gen_toks": GENERATED, "do_sample": False}
    prompts = [prompt for prompt in prompts if models.lm_eval.tok_encode(prompt)]
    expected = [alone(models.lm_eval, "generate_until", (prompt, wanted)) for prompt in prompts]
    models.ours["native"].engine.budget = budget
    for model in models.ours.values():
        assert model.generate_until(asked("generate_until", [(prompt, wanted) for prompt in prompts])) == expected


@given(st.lists(texts, min_size=1, max_size=6), budgets)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whole_texts_are_scored_as_each_alone(models, whole, budget):
    expected = [alone(models.lm_eval, "loglikelihood_rolling", (text,)) for text in whole]
    models.ours["native"].engine.budget = budget
    for model in models.ours.values():
        found = model.loglikelihood_rolling(asked("loglikelihood_rolling", [(text,) for text in whole]))
        assert found == pytest.approx(expected, abs=1e-4)


def test_continuations_behind_the_same_tokens_keep_their_places(models):
    """What one reads is what another reads, and theirs end in other places: lm-eval's own backend takes the first ones."""
    requests = [(None, [5, 6], [7, 8]), (None, [5, 6, 7], [9]), (None, [5], [6, 7, 4]), (None, [5, 6, 7], [3])]
    expected = [models.lm_eval._loglikelihood_tokens([request], disable_tqdm=True)[0] for request in requests]
    for model in models.ours.values():
        found = model._loglikelihood_tokens(requests)
        for (score, greedy), (wanted, most_likely) in zip(found, expected, strict=True):
            assert (score, greedy) == (pytest.approx(wanted, abs=1e-4), most_likely)


@pytest.mark.parametrize(
    ("pair", "reason"),
    [
        (("def", "x=1;" * 40), r"item 1: the choice 'x=1;x=1;[^']*\.\.\.' has \d+ tokens, the context has room for 24"),
        (("def", ""), "item 1: the choice '' after 'def' has no tokens of its own"),
        (("cla", "ss"), "item 1: the choice 'ss' after 'cla' has no tokens of its own"),
        (("", ""), "item 1: the choice '' has no tokens"),
        (("", "<s>"), "item 1: the choice '<s>' after '' has no tokens of its own"),
        ((" ", "def"), "item 1: the context ' ' of 'def' has no tokens"),
    ],
)
def test_an_item_without_an_answer_is_named(models, pair, reason):
    if pair[0] == " " and models.lm_eval.tok_encode(""):
        pytest.skip("a bos token stands before a blank context")
    for model in models.ours.values():
        with pytest.raises(UserError, match=reason):
            model.loglikelihood(asked("loglikelihood", [("def", " f"), pair, ("def", " f")]))


def test_an_empty_prompt_is_named(models):
    if models.lm_eval.tok_encode(""):
        pytest.skip("a bos token stands in an empty prompt")
    for model in models.ours.values():
        with pytest.raises(UserError, match="task t, item 1: the prompt '' has no tokens"):
            model.generate_until(asked("generate_until", [("def", {"max_gen_toks": 2}), ("", {"max_gen_toks": 2})]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_yields_no_numbers_has_no_scores(value, tmp_path):
    """lm-eval takes the first of several NaN for the likeliest choice, and an accuracy of them is a number."""
    directory = str(random_llama.build(tmp_path / "model", CONTEXT))
    for backend in ("native", "hf"):
        model = backends.make(backends.choose(directory, backend, "float32", 3, None), tmp_path)
        head = model.model.llama.lm_head if backend == "native" else model.model.lm_head
        with torch.no_grad():
            head.weight[7] = value
        with pytest.raises(UserError, match="not numbers"):
            model.loglikelihood(asked("loglikelihood", [("def", " f"), ("class", " x")]))
        with pytest.raises(UserError, match="not numbers"):
            model.loglikelihood_rolling(asked("loglikelihood_rolling", [("def f(self):",)]))
        with pytest.raises(UserError, match="not numbers"):
            model.generate_until(asked("generate_until", [("def", {"max_gen_toks": 3})]))
