"""Scores one HumanEval completion in the sandbox. Called by lm-eval through `humaneval.yaml`."""

from __future__ import annotations

from typing import Any


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1.0 if the prompt with the completion passes the problem's tests, contained."""
    from evalsuite.sandbox import Sandbox

    program = doc["prompt"] + results[0] + "\n" + doc["test"] + f"\ncheck({doc['entry_point']})\n"
    return {"pass@1": float(Sandbox.shared().run(program).passed)}
