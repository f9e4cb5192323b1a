"""Attention calls of the native evaluation: how many, and of how many shapes, as on a CPU and as on a GPU.

    python benchmarks/eval_calls.py            a table; about a minute on two cores, no GPU is needed
    python benchmarks/eval_calls.py --json     the same as JSON

How the work is cut is a setting, not a property of the machine: both plans run here, on a Llama of seeded random weights
that is far too small to wait for, over synthetic items whose lengths are those of the real sets (Llama 2's tokenizer).
Every score under the GPU's plan is held against the CPU's and against that of the request alone, in fp32. `padded` is what
the calls compute, query times key positions, over what the items need. Exit code 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from record import record, show
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evalsuite.budget import PASS_TOKENS, ROWS, Budget
from evalsuite.cohorts import Prompt
from evalsuite.forest import Forest
from evalsuite.generation import CohortsCache, Generation
from evalsuite.scoring import Continuation, Work, log_likelihoods
from tinyllama.model.config import ModelConfig
from tinyllama.model.llama import Llama

SHAPE = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
PLANS = {device: (PASS_TOKENS[device], ROWS[device], device == "cuda") for device in ("cpu", "cuda")}
TOLERANCE = 1e-4  # of a request's summed log-probability
# Attention calls per layer and distinct shapes of them, at most.
BARS = {"hellaswag": (60, 40), "mmlu": (40, 40)}
# Calls per layer and step, distinct shapes over the whole generation.
GENERATION_BARS = (2.0, 40)
EOS = 2


# -- Items -------------------------------------------------------------------------------------------------------------


def _tokens(generator: np.random.Generator, count: float) -> list[int]:
    return generator.integers(3, SHAPE["vocab_size"], max(1, round(count))).tolist()


def hellaswag_like(items: int, seed: int = 0) -> list[list[Continuation]]:
    """Four endings per item; two thirds WikiHow (about 77 tokens and 43), one third ActivityNet (32 and 15)."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(items):
        wikihow = generator.random() < 0.677
        context, ending = ((77, 15), (43, 10)) if wikihow else ((32, 10), (15, 7))
        begun = [1, *_tokens(generator, max(8.0, generator.normal(*context)))]
        endings = [_tokens(generator, max(2.0, generator.normal(*ending))) for _ in range(4)]
        found.append([Continuation((begun + targets)[:-1], targets) for targets in endings])
    return found


def mmlu_like(subjects: int, items: int, seed: int = 0) -> list[list[Continuation]]:
    """Five-shot: a median of 500 tokens that a subject's questions share, questions of 85, four letters to choose from."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(subjects):
        shots = [1, *_tokens(generator, min(2750, generator.lognormal(6.22, 0.49)))]
        for _ in range(items):
            question = shots + _tokens(generator, min(1170, generator.lognormal(4.45, 0.6)))
            found.append([Continuation(question, [letter]) for letter in (10, 11, 12, 13)])
    return found


def bbh_like(tasks: int, items: int, most: int, seed: int = 0) -> list[Prompt]:
    """Three-shot: a median of 340 tokens that a task's questions share, questions of 87."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(tasks):
        shots = [1, *_tokens(generator, min(875, generator.lognormal(5.84, 0.65)))]
        for _ in range(items):
            ids = shots + _tokens(generator, min(600, generator.lognormal(4.46, 0.87)))
            found.append(Prompt(ids, int(generator.integers(1, most + 1)), ()))
    return found


def tiny_llama(scale: float = 3, **changed: int) -> Llama:
    """Seeded random weights, scaled until choices are so far from uniform that a wrong prefix shows. changed: of SHAPE."""
    llama = Llama(ModelConfig(**{**SHAPE, **changed}))
    llama.initialize(3)
    with torch.no_grad():
        for parameter in llama.parameters():
            if parameter.ndim == 2:
                parameter.mul_(scale)
    return llama


# -- Counting ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Calls:
    """shapes: of each attention call and how often, over all layers. positions: heads times queries times keys."""

    shapes: Counter[tuple] = dataclasses.field(default_factory=Counter)
    positions: int = 0


@contextlib.contextmanager
def counted() -> Iterator[Calls]:
    """Counts what goes through torch's attention."""
    found, original = Calls(), F.scaled_dot_product_attention

    def counting(query: torch.Tensor, key: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        found.shapes[tuple(query.shape), tuple(key.shape)] += 1
        found.positions += query.shape[:-1].numel() * key.shape[2]
        return original(query, key, *rest, **more)

    F.scaled_dot_product_attention = counting
    try:
        yield found
    finally:
        F.scaled_dot_product_attention = original


class Operations(TorchDispatchMode):
    """Counts tensor operations that compute or copy; each is at least one kernel on a GPU."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted_steps() -> Iterator[dict[str, Any]]:
    """Counts the attention calls of generation's steps, which are matrix products: one call per cohort."""
    found: dict[str, Any] = {"calls": 0, "attended": 0, "shapes": set(), "operations": Operations()}
    original = CohortsCache.attend

    def counting(cache: CohortsCache, layer: int, *tensors: Any) -> torch.Tensor:
        found["calls"] += len(cache.cohorts)
        found["attended"] += 1
        found["shapes"] |= {(type(c).__name__, *(tuple(t[0].shape) for t in kept(c))) for c in cache.cohorts}
        with found["operations"]:
            return original(cache, layer, *tensors)

    def kept(cohort: Any) -> list[Any]:
        return [cohort.bases[0] if hasattr(cohort, "bases") else cohort.base[0], cohort.tails[0]]

    CohortsCache.attend = counting  # type: ignore[method-assign]
    try:
        yield found
    finally:
        CohortsCache.attend = original  # type: ignore[method-assign]


def needed_positions(wanted: list[Continuation]) -> int:
    """Heads times queries times keys that the unique prefixes need."""
    depths = sum(
        (t.length * (t.length + 1) - t.shared * (t.shared + 1)) // 2 for t in Forest([w.read for w in wanted]).tails
    )
    return depths * SHAPE["num_attention_heads"]


# -- One set under both plans --------------------------------------------------------------------------------------------


@torch.no_grad()
def alone(model: Llama, wanted: list[Continuation]) -> list[tuple[float, bool]]:
    """Every request by itself; those of one length go through the model side by side, which shares nothing."""
    found: list[Any] = [None] * len(wanted)
    by_length: dict[int, list[int]] = {}
    for index, request in enumerate(wanted):
        by_length.setdefault(len(request.read), []).append(index)
    for length, indices in by_length.items():
        for first in range(0, len(indices), max(1, 8192 // length)):
            chosen = indices[first : first + max(1, 8192 // length)]
            logits = model(torch.tensor([wanted[index].read for index in chosen]))
            for row, index in zip(logits, chosen, strict=True):
                targets = torch.tensor(wanted[index].targets)
                scores = row[-len(targets) :].double().log_softmax(-1)
                chosen_scores = scores[torch.arange(len(targets)), targets]
                found[index] = (float(chosen_scores.sum()), bool((scores.argmax(-1) == targets).all()))
    return found


def scored(model: Llama, items: list[list[Continuation]], plan: str) -> tuple[list[tuple[float, bool]], dict[str, Any]]:
    """The scores, and how they were computed, by the plan of a device."""
    wanted = [request for item in items for request in item]
    work, layers = Work(), model.config.num_hidden_layers
    with counted() as calls:
        scores = log_likelihoods(model, wanted, Budget(*PLANS[plan]), work)
    return scores, {
        "calls_per_layer": sum(calls.shapes.values()) / layers,
        "shapes": len(calls.shapes),
        "tokens": work.computed,
        "padded": calls.positions / layers / needed_positions(wanted),
    }


def compared(model: Llama, items: list[list[Continuation]]) -> dict[str, Any]:
    """Both plans on one set, and how far the scores are apart."""
    sizes = [len(item) for item in items]
    (cpu, on_cpu), (gpu, on_gpu) = scored(model, items, "cpu"), scored(model, items, "cuda")
    single = alone(model, [request for item in items for request in item])

    def distance(first: list[tuple[float, bool]], second: list[tuple[float, bool]]) -> float:
        return max(abs(a - b) for (a, _), (b, _) in zip(first, second, strict=True))

    def choices(scores: list[tuple[float, bool]]) -> list[int]:
        values = iter(score for score, _ in scores)
        return [int(np.argmax([next(values) for _ in range(size)])) for size in sizes]

    return {
        "items": len(items),
        "cpu": on_cpu,
        "gpu": on_gpu,
        "largest_difference_from_cpu": distance(gpu, cpu),
        "largest_difference_from_alone": distance(gpu, single),
        "choices_differing": sum(a != b for a, b in zip(choices(gpu), choices(single), strict=True)),
        "greedy_differing": sum(a != b for (_, a), (_, b) in zip(gpu, single, strict=True)),
    }


def generated(model: Llama, prompts: list[Prompt]) -> dict[str, Any]:
    """Both plans' generation: texts, and the calls and operations of attention per layer and step."""
    found: dict[str, Any] = {"items": len(prompts)}
    texts = {}
    for name, plan in (("cpu", "cpu"), ("gpu", "cuda")):
        with counted_steps() as steps:
            texts[name] = Generation(model, prompts, EOS, lambda rows: [""] * len(rows)).run(
                Budget(*PLANS[plan]), Work(), lambda _: None
            )
        found[name] = {
            "steps": steps["attended"] // model.config.num_hidden_layers,
            "calls_per_layer_and_step": steps["calls"] / steps["attended"],
            "operations_per_layer_and_step": steps["operations"].count / steps["attended"],
            "shapes": len(steps["shapes"]),
        }
    found["texts_differing"] = sum(a != b for a, b in zip(texts["cpu"], texts["gpu"], strict=True))
    return found


def missed(sets: dict[str, Any]) -> list[str]:
    """What is over its bar, in words."""
    found = []
    for name, (calls, shapes) in BARS.items():
        result = sets[name]
        found += [f"{name}: {result['gpu']['calls_per_layer']:.0f} calls, bar {calls}"] * (
            result["gpu"]["calls_per_layer"] > calls
        )
        found += [f"{name}: {result['gpu']['shapes']} shapes, bar {shapes}"] * (result["gpu"]["shapes"] > shapes)
        for key in ("largest_difference_from_cpu", "largest_difference_from_alone"):
            found += [f"{name}: {key} {result[key]:.1e}, bar {TOLERANCE:g}"] * (not result[key] <= TOLERANCE)
        found += [f"{name}: {result['choices_differing']} choices differ"] * (result["choices_differing"] > 0)
    calls, shapes = GENERATION_BARS
    bbh = sets["bbh"]
    found += [f"bbh: {bbh['texts_differing']} texts differ"] * (bbh["texts_differing"] > 0)
    found += ["bbh: calls per layer and step"] * (bbh["gpu"]["calls_per_layer_and_step"] > calls)
    return found + ["bbh: shapes"] * (bbh["gpu"]["shapes"] > shapes)


def print_tables(sets: dict[str, Any]) -> None:
    """Scoring and generation, for people."""
    rows = []
    for name in BARS:
        result = sets[name]
        for plan in ("cpu", "gpu"):
            figures = result[plan]
            bar = "{} / {}".format(*BARS[name]) if plan == "gpu" else ""
            rows.append([f"{name}, {plan}", f"{result['items']:,}", f"{figures['tokens']:,}"])
            rows[-1] += [
                f"{figures['calls_per_layer']:,.0f}",
                f"{figures['shapes']:,}",
                bar,
                f"{figures['padded']:.2f}",
            ]
            same = plan == "gpu"
            rows[-1] += [f"{result['largest_difference_from_alone']:.1e}" if same else ""]
            rows[-1] += [str(result["choices_differing"]) if same else ""]
    columns = ["scoring", "items", "tokens", "calls a layer", "shapes", "bars", "padded", "off alone", "choices differ"]
    show("Attention calls of the native evaluation", columns, rows)
    bbh, rows = sets["bbh"], []
    for plan in ("cpu", "gpu"):
        found = bbh[plan]
        rows.append(
            [f"bbh, {plan}", str(bbh["items"]), str(found["steps"]), f"{found['calls_per_layer_and_step']:.2f}"]
        )
        rows[-1] += [f"{found['operations_per_layer_and_step']:.0f}", str(found["shapes"]), str(bbh["texts_differing"])]
    columns = ["generation", "items", "steps", "calls a layer and step", "operations", "shapes", "texts differ"]
    show("Attention of generation's steps", columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of the tables")
    parser.add_argument("--output", type=Path, help="JSON; default benchmarks/results/eval_calls.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = tiny_llama()
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "hellaswag": lambda: compared(model, hellaswag_like(2000)),
        "mmlu": lambda: compared(model, mmlu_like(57, 20)),
        "bbh": lambda: generated(model, bbh_like(27, 20, 48)),
    }
    sets = {name: measure() for name, measure in measures.items()}
    over = missed(sets)
    values = {"model": SHAPE, "bars": BARS, "generation_bars": GENERATION_BARS, "sets": sets, "missed": over}
    path = record("eval_calls", ["torch"], values, arguments.output)
    if arguments.json:
        print(json.dumps(values, indent=2))
    else:
        print_tables(sets)
        print(path)
    if over:
        sys.exit("error: " + "; ".join(over))


if __name__ == "__main__":
    main()
