"""pass@k: of n completions of a problem, how likely one of k passes. Judges completions in the sandbox, each program once.

The estimator is the unbiased one of Chen et al. 2021 (arXiv:2107.03374, section 2.1), in exact arithmetic.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any

from evalsuite.sandbox import Sandbox, Verdict
from evalsuite.suites import PAPER
from evalsuite.tasks.paper_prompts import TIMEOUT_S, humaneval_completion

KS = (1, 10, 100)


def ks(count: int) -> list[int]:
    """The k that n completions can say something about."""
    return [k for k in KS if k <= count]


def pass_at_k(count: int, passed: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the share of the draws of k out of n completions with one of the c that passed."""
    return float(1 - Fraction(math.comb(count - passed, k), math.comb(count, k)))


def scores(passed: Sequence[bool]) -> dict[str, float]:
    """pass@k of one problem's completions."""
    return {f"pass@{k}": pass_at_k(len(passed), sum(passed), k) for k in ks(len(passed))}


def program(doc: dict[str, Any], completion: str, protocol: str) -> tuple[str, str]:
    """The problem's beginning with what is kept of a completion, and the tests."""
    kept = humaneval_completion(completion) if protocol == PAPER else completion
    return f"{doc['prompt']}{kept}\n", f"{doc['test']}\ncheck({doc['entry_point']})\n"


def sandbox_record() -> dict[str, Any]:
    """What the verdicts of this process depend on, for the results."""
    return Sandbox.shared().record()


@functools.cache
def _judged(parts: tuple[str, str], wall_s: float | None) -> Verdict:
    return Sandbox.shared().run(parts[0], wall_s, tests=parts[1])


def judge(doc: dict[str, Any], completions: Sequence[str], protocol: str) -> list[Verdict]:
    """The verdicts on a problem's completions; equal programs run once."""
    wall_s = TIMEOUT_S if protocol == PAPER else None
    programs = [program(doc, completion, protocol) for completion in completions]
    Sandbox.shared()  # proven before threads need it
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(lambda parts: _judged(parts, wall_s), dict.fromkeys(programs)))
    return [_judged(parts, wall_s) for parts in programs]
