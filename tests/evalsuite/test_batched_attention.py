"""Attention in few calls of few shapes: who sees whom, how many calls, and what else a GPU is given otherwise than a CPU."""

from __future__ import annotations

import subprocess
import sys

import eval_calls
import numpy as np
import pytest
import random_llama
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from evalsuite import backends, budget, earlier_results
from evalsuite.batched_attention import (
    BLOCKS,
    KEYS,
    QUERIES,
    BatchedTreeCache,
    block_paths,
    calls_of,
    kernels,
    padded_keys,
    subtree_ends,
)
from evalsuite.cohorts import together
from evalsuite.forest import Forest, Passes
from evalsuite.scoring import Continuation
from tinyllama.model.config import ModelConfig

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def cut(forest: Forest, size: int) -> list:
    passes = Passes(forest)
    return list(iter(lambda: passes.take(size), None))


@st.composite
def forests(draw) -> Forest:
    """Sequences of few tokens, some of them long, so that prefixes of every length are shared."""
    found = []
    for _ in range(draw(st.integers(1, 12))):
        start = draw(st.sampled_from([[], [1] * 150, [2] * 400]))
        found.append(start + draw(st.lists(st.integers(0, 2), min_size=1, max_size=60)))
    return Forest(found)


@given(forests(), st.sampled_from([5, 130, 300, 5000]))
@settings(max_examples=25, deadline=None)
def test_a_block_sees_its_own_tokens_ancestors_and_nothing_else(forest, size):
    # From the definition: a token sees the tokens of its own sequence up to itself.
    path_of = np.concatenate([forest.places([(0, n.size) for n in forest.sequences])[t.sequence] for t in forest.tails])
    ancestors: dict[int, set[int]] = {}
    for places in forest.places([(0, len(s)) for s in forest.sequences]):
        for depth, place in enumerate(places.tolist()):
            ancestors[place] = set(places[: depth + 1].tolist())
    assert set(path_of.tolist()) == set(ancestors) == set(range(forest.size))
    for one in cut(forest, size):
        cache = BatchedTreeCache(one, None, CPU)
        carried = forest.places([(0, len(s)) for s in forest.sequences])[one.pieces[0].sequence][: one.carried]
        store = np.concatenate([carried, one.start + np.arange(one.size)])
        answered = set()
        for call in cache.calls:
            for block, keys, seen in zip(call.blocks.tolist(), call.keys.numpy(), call.seen.numpy(), strict=True):
                assert seen.any(1).all()  # a softmax over nothing is not a number
                for query in range(QUERIES):
                    at = block * QUERIES + query
                    if at < one.size:
                        rows = store[keys[seen[query]]].tolist()
                        assert len(rows) == len(set(rows))
                        assert set(rows) == ancestors[one.start + at]
                        answered.add(at)
        assert answered == set(range(one.size))


def test_subtrees_end_where_the_next_token_of_no_greater_depth_stands():
    (one,) = cut(Forest([[1, 2, 3, 4], [1, 2, 5], [1, 6], [7]]), 100)
    assert subtree_ends(one).tolist() == [6, 5, 4, 4, 5, 6, 7]
    second = cut(Forest([[1, 2, 3, 4], [1, 2, 5], [1, 6], [7]]), 4)[1]
    assert (second.carried, subtree_ends(second).tolist()) == (2, [2, 1, 1, 2, 3])


@given(st.integers(1, 20000))
def test_keys_are_padded_to_one_of_few_lengths(needed):
    padded = padded_keys(needed)
    assert padded % (KEYS // 2) == 0
    assert needed <= padded <= max(KEYS, 1.5 * needed + 1)
    assert len({padded_keys(n) for n in range(1, 4097, 16)}) == 9


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=400))
@settings(max_examples=50, deadline=None)
def test_every_block_is_in_one_call_and_calls_have_few_sizes(lengths):
    found = calls_of([np.arange(length) for length in lengths])
    blocks = np.concatenate([blocks for blocks, _ in found]).tolist()
    assert sorted(blocks) == list(range(len(blocks)))
    assert len(blocks) < 2 * len(lengths)
    for blocks, rows in found:
        assert len(blocks) == len(rows) <= BLOCKS
        assert len(blocks) & (len(blocks) - 1) == 0
        for block, row in zip(blocks.tolist(), rows, strict=True):
            assert row[row >= 0].tolist() == list(range(lengths[block] if block < len(lengths) else 0))


# -- The bars ------------------------------------------------------------------------------------------------------------


def planned(items: list[list[Continuation]]) -> list[tuple[int, int]]:
    """The size of each call's batch and keys that the GPU's plan has for a whole set, without computing it."""
    forest = Forest([request.read for item in items for request in item])
    passes = cut(forest, budget.PASS_TOKENS["cuda"])
    return [rows.shape for one in passes for _, rows in calls_of(block_paths(one))]


def test_the_whole_sets_take_few_calls_of_few_shapes():
    for items, bars in (
        (eval_calls.hellaswag_like(2000), eval_calls.BARS["hellaswag"]),
        (eval_calls.mmlu_like(57, 20), eval_calls.BARS["mmlu"]),
    ):
        calls = planned(items)
        assert len(calls) <= bars[0] / 2
        assert len(set(calls)) <= bars[1] / 2


def test_small_sets_have_equal_scores_and_texts_in_few_calls():
    model = eval_calls.tiny_llama()
    for items in (eval_calls.hellaswag_like(100, seed=1), eval_calls.mmlu_like(4, 6, seed=1)):
        found = eval_calls.compared(model, items)
        assert found["gpu"]["calls_per_layer"] <= 4
        assert found["gpu"]["calls_per_layer"] * 10 < found["cpu"]["calls_per_layer"]
        assert found["gpu"]["tokens"] == found["cpu"]["tokens"]
        assert max(found["largest_difference_from_cpu"], found["largest_difference_from_alone"]) < 1e-4
        assert found["choices_differing"] == found["greedy_differing"] == 0
    steps = eval_calls.generated(model, eval_calls.bbh_like(9, 6, 20, seed=1))
    assert steps["texts_differing"] == 0
    assert steps["gpu"]["calls_per_layer_and_step"] <= 2 < steps["cpu"]["calls_per_layer_and_step"]


@pytest.mark.slow
def test_the_benchmark_meets_its_bars(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "eval_calls.py", "--output", tmp_path / "calls.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60))
def test_cohorts_are_joined_with_few_empty_slots(sizes):
    found = together(sizes)
    assert sorted(number for members in found for number in members) == list(range(len(sizes)))
    for members in found:
        rows = [sizes[number] for number in members]
        assert len(rows) == 1 or max(rows) * len(rows) <= 2 * sum(rows) + 256
    assert len(found) <= 4


# -- What follows from the device ------------------------------------------------------------------------------------------


def test_a_gpu_computes_in_bfloat16_and_a_cpu_in_float32(tmp_path, monkeypatch):
    assert (backends.default_dtype("cpu"), backends.default_dtype("cuda")) == ("float32", "bfloat16")
    random_llama.build(tmp_path)
    choices = {}
    for cuda in (False, True):
        monkeypatch.setattr(backends, "_has_cuda", lambda cuda=cuda: cuda)
        for backend in ("native", "hf", "vllm"):
            choices[cuda, backend] = backends.choose(str(tmp_path), backend, None, None, None)
            assert choices[cuda, backend].dtype == ("bfloat16" if cuda else "float32")
            assert backends.choose(str(tmp_path), backend, "float32", None, None).dtype == "float32"
    # A result of one is never taken for the other's.
    results = [{"settings": {"dtype": choices[cuda, "native"].dtype}} for cuda in (False, True)]
    assert earlier_results.what_decides(results[0]) != earlier_results.what_decides(results[1])


def test_passes_follow_from_the_free_memory():
    config = ModelConfig()
    sizes = [budget.pass_tokens(config, 2, "cuda", gib * 2**30) for gib in (0.01, 0.5, 2, 4, 8, 16, 70)]
    assert sizes == sorted(sizes)
    assert sizes[0] == QUERIES
    assert sizes[-1] == budget.PASS_TOKENS["cuda"]
    assert all(size % QUERIES == 0 for size in sizes)
    for size, gib in zip(sizes[1:], (0.5, 2, 4, 8, 16, 70), strict=True):
        assert size * budget.token_bytes(config, 2) <= gib * 2**29
    assert budget.pass_tokens(config, 4, "cpu", 2**20) == budget.PASS_TOKENS["cpu"]
    assert budget.logit_rows("cuda", 32000) * 32000 * 12 <= budget.LOGIT_BYTES
    assert budget.logit_rows("cpu", 32000) == 512


def test_only_a_gpu_gets_few_calls_and_never_cudnn():
    assert not budget.Budget(1, 1).batches("cpu")
    assert budget.Budget(1, 1).batches("cuda")
    assert budget.Budget(1, 1, True).batches("cpu")
    assert kernels("cpu") is None
    assert [kernel.name for kernel in kernels("cuda") or []] == ["EFFICIENT_ATTENTION", "MATH"]


def test_float32_is_float32_whatever_was_set():
    code = (
        "import torch; torch.backends.cuda.matmul.allow_tf32 = True; from evalsuite.backends import exact_float32;"
        "exact_float32(); assert not torch.backends.cuda.matmul.allow_tf32;"
        "assert torch.backends.cuda.matmul.fp32_precision == 'ieee'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_scoring_needs_none_of_the_heavy_packages():
    blocked = ("lm_eval", "vllm", "orjson", "pydantic", "deepspeed", "datasets", "datatrove", "transformers")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))\n"
        "import eval_calls\nfrom evalsuite.budget import budget_of\nfrom evalsuite.scoring import *\n"
        "model = eval_calls.tiny_llama()\nbudget, work = budget_of(model, 2**30), Work()\n"
        "found = log_likelihoods(model, [Continuation([1, 5], [7])], budget, work)\n"
        "assert len(found) == 1 and work.computed == 2"
    )
    paths = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'benchmarks')!r}]\n"
    subprocess.run([sys.executable, "-c", paths + code], check=True)
