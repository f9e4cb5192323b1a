"""Shared prefixes are computed once, and nothing but the order of floating-point sums may tell."""

from __future__ import annotations

import eval_calls
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evalsuite.budget import Budget
from evalsuite.cohorts import Prompt
from evalsuite.engines import Local
from evalsuite.forest import Forest, Passes
from evalsuite.generation import CohortsCache, Generation
from evalsuite.scoring import Continuation, Work, log_likelihoods
from tinyllama.errors import UserError
from tinyllama.model.llama import Llama

VOCABULARY = 40
EOS = 2


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """A model this small is slower on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> Llama:
    return eval_calls.tiny_llama(8, vocab_size=VOCABULARY, intermediate_size=48, max_position_embeddings=512)


def alone(model: Llama, request: Continuation) -> tuple[float, bool]:
    """One request by itself, in the plainest way."""
    with torch.no_grad():
        logits = model(torch.tensor([request.read]))[0, -len(request.targets) :]
    targets = torch.tensor(request.targets)
    chosen = logits.log_softmax(-1)[torch.arange(len(targets)), targets]
    return float(chosen.sum()), bool((logits.argmax(-1) == targets).all())


def continued(model: Llama, prompt: Prompt) -> list[int]:
    """One prompt by itself, the whole text through the model for each token."""
    made: list[int] = []
    while len(made) < prompt.most:
        with torch.no_grad():
            token = int(model(torch.tensor([[*prompt.ids, *made]]))[0, -1].argmax())
        if token == EOS:
            break
        made.append(token)
        if any(stop in text(made) for stop in prompt.stops):
            break
    return made


def text(ids: list[int]) -> str:
    return "".join(chr(ord("A") + i) for i in ids)


def decode(rows: list[list[int]]) -> list[str]:
    return [text(row) for row in rows]


tokens = st.integers(3, VOCABULARY - 1)
beginnings = st.sampled_from([[1], [1, *range(3, 30)], [1, *range(3, 30), *([5, 6, 7] * 30)], [1, 9, 9, 9]])


@st.composite
def requests(draw) -> list[Continuation]:
    found = []
    for _ in range(draw(st.integers(1, 12))):
        context = draw(beginnings) + draw(st.lists(tokens, max_size=12))
        targets = draw(st.lists(tokens, min_size=1, max_size=4))
        found.append(Continuation((context + targets)[:-1], targets))
    return found + found[: draw(st.integers(0, 2))]


@given(requests(), st.sampled_from([1, 7, 64, 4096]), st.booleans())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_scores_are_those_of_each_request_alone(model, wanted, size, batched):
    work = Work()
    found = log_likelihoods(model, wanted, Budget(size, 4, batched), work)
    for request, (score, greedy) in zip(wanted, found, strict=True):
        expected = alone(model, request)
        assert score == pytest.approx(expected[0], abs=1e-4)
        assert greedy == expected[1]
    prefixes = {tuple(r.read[: n + 1]) for r in wanted for n in range(len(r.read))}
    assert work.computed == work.tree == len(prefixes)
    assert work.alone == sum(map(len, {tuple(r.read) for r in wanted}))


@given(st.data(), st.sampled_from([16, 100, 4096]), st.sampled_from([1, 3, 64]), st.booleans())
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_texts_are_those_of_each_prompt_alone(model, data, size, rows, batched):
    prompts = []
    for _ in range(data.draw(st.integers(1, 8))):
        ids = data.draw(beginnings) + data.draw(st.lists(tokens, max_size=12))
        stops = tuple(data.draw(st.lists(st.sampled_from(["F", "GH", "JJ"]), max_size=2)))
        prompts.append(Prompt(ids, data.draw(st.integers(1, 40)), stops))
    work = Work()
    found = Generation(model, prompts, EOS, decode).run(Budget(size, rows, batched), work, lambda _: None)
    assert found == [continued(model, prompt) for prompt in prompts]
    assert work.computed == work.tree


@pytest.mark.parametrize("batched", [False, True])
def test_a_long_generation_keeps_its_place(model, batched):
    """Many rows that end at different times, over several packings and growths of their keys and values."""
    generator = np.random.default_rng(0)
    prompts = [
        Prompt([1, *range(3, 30), *generator.integers(3, VOCABULARY, n % 7 + 1).tolist()], 20 + 6 * n, ())
        for n in range(16)
    ]
    found = Generation(model, prompts, EOS, decode).run(Budget(256, 8, batched), Work(), lambda _: None)
    assert found == [continued(model, prompt) for prompt in prompts]
    assert max(map(len, found)) > 64


def test_drawn_tokens_depend_on_the_prompt_and_its_seed_alone(model):
    ids = [1, *range(3, 20)]
    prompts = [Prompt(ids, 30, (), 1.0, seed) for seed in (5, 6, 5)]
    others = [Prompt([1, 9, n], 12, (), 1.0, n) for n in range(3, 9)]
    first, second, third = Generation(model, prompts, EOS, decode).run(Budget(64, 2, True), Work(), lambda _: None)
    again = Generation(model, others + prompts, EOS, decode).run(Budget(512, 64), Work(), lambda _: None)
    assert first == third == again[-1]
    assert first != second


def test_passes_cover_the_forest_once_and_carry_one_path():
    sequences = [[1, 2, 3, 4, 5], [1, 2, 3, 6], [1, 2, 7, 8, 9, 10], [1, 2, 3, 6], [4]]
    forest = Forest(sequences)
    assert forest.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 4]
    assert forest.owner == [0, 1, 2, 1, 4]
    places = forest.places([(0, len(s)) for s in sequences])
    assert [forest.tokens[p].tolist() for p in places] == sequences
    cuts = Passes(forest)
    one = cuts.take(4)
    cuts.back()
    assert cuts.take(4) == one
    rest = [one, *iter(lambda: cuts.take(4), None)]
    assert [(cut.start, cut.size, cut.carried) for cut in rest] == [(0, 4, 0), (4, 4, 4), (8, 3, 4)]


@pytest.mark.parametrize("batched", [False, True])
def test_memory_that_ends_halves_the_passes(model, monkeypatch, batched):
    """The allocator's own error, from the model itself, until the passes are small enough."""
    whole = model.model.forward
    sizes = []

    def limited(ids, *args, **kwargs):
        sizes.append(ids.shape[1])
        if ids.shape[1] > 100:
            torch.empty(2**62, dtype=torch.uint8)
        return whole(ids, *args, **kwargs)

    monkeypatch.setattr(model.model, "forward", limited)
    wanted = [Continuation([1, n, *range(3, 20)], [8]) for n in range(3, VOCABULARY)]
    budget = Budget(4096, 64, batched)
    found = log_likelihoods(model, wanted, budget, Work())
    assert budget.tokens < 200 < max(sizes)
    monkeypatch.undo()
    for (score, greedy), request in zip(found, wanted, strict=True):
        assert (pytest.approx(score, abs=2e-4), greedy) == alone(model, request)


@pytest.mark.parametrize("batched", [False, True])
def test_memory_that_ends_beside_the_passes_halves_the_rows(model, monkeypatch, batched):
    """The allocator's own error, from the logits and from the attention of too many rows."""
    attended, whole = CohortsCache.attend, model.lm_head.forward
    sizes: list[int] = []

    def limited_logits(hidden):
        sizes.append(len(hidden))
        return whole(hidden) if len(hidden) <= 20 else torch.empty(2**62, dtype=torch.uint8)

    def limited_rows(cache, layer, q, k, v, mask):
        sizes.append(q.shape[2])
        return attended(cache, layer, q, k, v, mask) if q.shape[2] <= 20 else torch.empty(2**62, dtype=torch.uint8)

    wanted = [Continuation([1, n, *range(3, 20)], [8]) for n in range(3, VOCABULARY)]
    prompts = [Prompt([1, n, *range(3, 12)], 9, ("F",), float(n % 2), n) for n in range(3, VOCABULARY)]
    enough = Local(model, Budget(4096, 64, batched), EOS, decode)
    expected = enough.score(wanted), enough.extend(prompts)
    short = Local(model, Budget(4096, 64, batched), EOS, decode)
    with monkeypatch.context() as patch:
        patch.setattr(model.lm_head, "forward", limited_logits)
        scores = short.score(wanted)
    with monkeypatch.context() as patch:
        patch.setattr(CohortsCache, "attend", limited_rows)
        texts = short.extend(prompts)
    assert short.budget.rows < 64
    assert max(sizes) > 20
    assert [greedy for _, greedy in scores] == [greedy for _, greedy in expected[0]]
    assert [score for score, _ in scores] == pytest.approx([score for score, _ in expected[0]], abs=2e-4)
    assert texts == expected[1]
    assert short.work.tree == enough.work.tree


def test_weights_that_are_not_numbers_are_one_error(model):
    broken = Llama(model.config)
    broken.load_state_dict(model.state_dict())
    with torch.no_grad():
        broken.lm_head.weight[3, 3] = float("nan")
    with pytest.raises(UserError, match="not numbers"):
        log_likelihoods(broken, [Continuation([1, 4], [5])], Budget(64, 4), Work())
    with pytest.raises(UserError, match="not numbers"):
        Generation(broken, [Prompt([1, 4], 3, ())], EOS, decode).run(Budget(64, 4), Work(), lambda _: None)
