"""lm-eval's tasks whose answers are programs (`unsafe_code: true`): HumanEval's variants, MBPP's, CRUXEval's.

Most of them score with the metric `code_eval` of Hugging Face's evaluate, which is downloaded from the hub and runs programs
as the user who evaluates. `install` puts ours in its place: the same names, arguments and pass@k, run in the sandbox.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from evalsuite import passing
from evalsuite.sandbox import Sandbox, Verdict

CODE_EVAL = "code_eval"
TIMEOUT_S = 3.0  # of code_eval and of CRUXEval
OWN_JUDGE = "check_correctness"  # what CRUXEval's own metric runs a program with


def runs_in_sandbox(config: dict[str, Any]) -> bool:
    """Whether the programs of a task run in our sandbox. config: its definition, functions as text (lm-eval's load_yaml
    with resolve_func=False). False for a task that runs programs another way, such as one with a compiler.
    """
    modules = [path for metric in config.get("metric_list") or [] if (path := _module(metric.get("metric")))]
    return bool(modules) and "process_results" not in config and all(_is_served(path) for path in modules)


def _module(function: Any) -> Path | None:
    """The Python file that a definition's function is in; None for a metric that has a name of lm-eval's."""
    if callable(function):
        return Path(function.__code__.co_filename)
    if not isinstance(function, str) or "/" not in function:
        return None
    path = Path(function.rpartition(".")[0] + ".py")
    return path if path.is_file() else None


def _is_served(module: Path) -> bool:
    text = module.read_text(encoding="utf-8")
    return CODE_EVAL in text or (module.parent.name == "cruxeval" and f"def {OWN_JUDGE}(" in text)


class CodeEval:
    """What `evaluate.load("code_eval")` returns, with our sandbox in it."""

    def compute(
        self, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1, 10, 100),
        num_workers: int = 4, timeout: float = TIMEOUT_S,
    ) -> tuple[dict[str, float], dict[int, list[tuple[int, dict[str, Any]]]]]:  # fmt: skip
        """Mean pass@k over the problems, for each k that all have as many predictions for; and every verdict.

        references: the tests of each problem. predictions: the programs for each.
        """
        work = [(text, tests) for texts, tests in zip(predictions, references, strict=True) for text in texts]
        verdicts = iter(judge(work, timeout))
        found: dict[int, list[tuple[int, dict[str, Any]]]] = {}
        for task, texts in enumerate(predictions):
            found[task] = [
                (number, {"task_id": task, "passed": v.passed, "result": _result(v), "completion_id": number})
                for number, v in zip(range(len(texts)), verdicts, strict=False)
            ]
        counts = [(len(own), sum(entry["passed"] for _, entry in own)) for own in found.values()]
        scores = {
            f"pass@{number}": math.fsum(passing.pass_at_k(n, c, number) for n, c in counts) / len(counts)
            for number in k
            if counts and all(n >= number for n, _ in counts)
        }
        return scores, found


def _result(verdict: Verdict) -> str:
    return "passed" if verdict.passed else verdict.reason


def judge(work: Sequence[tuple[str, str]], timeout: float) -> list[Verdict]:
    """The verdicts on programs, each with its tests; equal ones run once."""
    sandbox, once = Sandbox.shared(), list(dict.fromkeys(work))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        verdicts = pool.map(lambda pair: sandbox.run(f"{pair[0]}\n", timeout, tests=pair[1]), once)
        found = dict(zip(once, verdicts, strict=True))
    return [found[pair] for pair in work]


def passes(program: str, timeout: float = TIMEOUT_S) -> bool:
    """Whether one program that has its tests in it passes: CRUXEval's check_correctness."""
    return Sandbox.shared().run(program, timeout).passed


def install() -> None:
    """From now on `evaluate.load("code_eval")` gives ours. lm-eval's tasks call it when their module is imported."""
    import evaluate

    if getattr(evaluate.load, "is_ours", False):
        return
    load = evaluate.load

    def ours(path: str, *args: Any, **kwargs: Any) -> Any:
        return CodeEval() if path == CODE_EVAL else load(path, *args, **kwargs)

    ours.is_ours = True  # type: ignore[attr-defined]
    evaluate.load = ours


def serve(task: Any) -> None:
    """Give a loaded lm-eval task that brings a judge of its own ours."""
    for metric in getattr(task, "_metric_fn_list", {}).values():
        names = getattr(metric, "__globals__", {})
        if OWN_JUDGE in names and Path(names.get("__file__", "")).parent.name == "cruxeval":
            names[OWN_JUDGE] = passes
