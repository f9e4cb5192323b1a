"""Downstream scores of the model as it trains. lm-eval itself is `evalsuite`'s, which is named here as text.

`train` imports no other package that builds on the core: what has to be scored, and how to make a forward pass, is handed
to the object that the name below stands for, when a recipe asks for it.
"""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllama.errors import ConfigError, MissingExtraError
from train import generators

if TYPE_CHECKING:
    import torch
    from deepspeed import DeepSpeedEngine

    from train.heartbeat import Heartbeat
    from train.recipe import Recipe

EVALUATION = ("evalsuite.live", "LiveEvaluation")
TASKS = ("evalsuite.definitions", "prepare_for_training")


def check(recipe: Recipe, tokenizer: Path | None) -> None:
    """UserError if the recipe asks for scores on the way that no run can have."""
    if not recipe.evaluation.every_steps:
        return
    _needed(tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        getattr(importlib.import_module(TASKS[0]), TASKS[1])(
            recipe.evaluation.tasks, recipe.evaluation.data_dir, Path(scratch)
        )


def _needed(tokenizer: Path | None) -> Path:
    """The tokenizer, if there is one, and lm-eval."""
    if tokenizer is None:
        raise ConfigError("evaluation.every_steps without a tokenizer", fix="give --tokenizer")
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingExtraError("lm_eval", "eval")
    return tokenizer


class Evaluation:
    """The recipe's evaluation section, on a DeepSpeed engine. Every method is collective."""

    def __init__(
        self, recipe: Recipe, engine: DeepSpeedEngine, tokenizer: Path | None, control: Any, beat: Heartbeat
    ) -> None:
        self._engine, self._beat = engine, beat
        settings = recipe.evaluation
        before = generators.read_state()
        self._evaluate = getattr(importlib.import_module(EVALUATION[0]), EVALUATION[1])(
            forward=self._forward,
            model=recipe.model,
            device=engine.device,
            control=control,
            tokenizer_model=_needed(tokenizer),
            tasks=settings.tasks,
            data_dir=settings.data_dir,
            limit=settings.limit,
            batch_size=settings.batch_size,
        )
        generators.write_state(before)

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits of ids (B, T), by a pass in which every rank takes part."""
        import torch

        self._beat("evaluate")
        with torch.no_grad():
            return self._engine(ids)

    def run(self) -> dict[str, dict[str, Any]]:
        """value, stderr, metric and n of each task. Leaves the generators, which lm-eval seeds, as they were."""
        before = generators.read_state()
        self._engine.eval()
        found = self._evaluate()
        self._engine.train()
        generators.write_state(before)
        return found

    def close(self) -> None:
        """Remove temporary files."""
        self._evaluate.close()
