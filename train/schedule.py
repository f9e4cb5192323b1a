"""The learning rate as a pure function of tokens seen. Torch-free.

Linear warmup, then either half a cosine down to `min_lr` (as TinyLlama's `pretrain/tinyllama.py`, but for its first step,
whose rate was zero), or WSD: the full rate until the last `decay_frac` of the tokens, and down to `min_lr` over those (Hu
et al., 2024, MiniCPM; "1-sqrt" is Haegele et al., 2024). No scheduler object: a resume or another batch size cannot put it
out of step.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tinyllama.errors import CheckpointError
from train.recipe import OptimizerConfig, Recipe, TrainingConfig, derived_warmup

DECAYS = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "1-sqrt": lambda progress: 1 - math.sqrt(progress),
}


JUMP = 1.1  # a rate that rises by more than a tenth from one step to the next
SCHEDULE = ("lr", "min_lr", "warmup_steps", "schedule", "decay_frac", "decay_shape")


def learning_rate(tokens_seen: int, recipe: Recipe | SimpleNamespace) -> float:
    """The rate of the step that starts after `tokens_seen` tokens.

    Warmup step k of n has lr * (k + 1) / n; step n is the first after it and has the full rate; at the end of training,
    and after it, the rate is min_lr.
    """
    opt, batch, total = recipe.optimizer, recipe.training.batch_tokens, recipe.training.tokens
    warmup = recipe.warmup_steps * batch
    if tokens_seen < warmup:
        return opt.lr * (tokens_seen + batch) / warmup
    if tokens_seen >= total:
        return opt.min_lr
    wsd = opt.schedule == "wsd"
    begin = max(warmup, total * (1 - opt.decay_frac)) if wsd else warmup
    if tokens_seen < begin:
        return opt.lr
    decay = DECAYS[opt.decay_shape if wsd else "cosine"]
    return opt.min_lr + (opt.lr - opt.min_lr) * decay((tokens_seen - begin) / (total - begin))


def describe(recipe: Recipe) -> str:
    """The schedule in one line, in steps of this run."""
    opt, steps, warmup = recipe.optimizer, recipe.num_steps, recipe.warmup_steps
    how = "" if opt.warmup_steps is not None else ", derived: optimizer.warmup_steps is null"
    text = f"learning rate {opt.lr:g} after {warmup:,} of {steps:,} steps of warm-up ({warmup / steps:.1%}{how}), "
    if opt.schedule == "cosine":
        return text + f"then a cosine down to {opt.min_lr:g}"
    begin = max(warmup, math.ceil(recipe.training.tokens * (1 - opt.decay_frac) / recipe.training.batch_tokens))
    return text + f"stable until step {begin:,}, then {opt.decay_shape} down to {opt.min_lr:g}"


def _past(recipe: dict[str, Any]) -> SimpleNamespace:
    """What `learning_rate` needs of a checkpoint's recipe, whatever this release would say of the rest."""

    def section(kind: Any, values: dict[str, Any]) -> Any:
        names = {field.name for field in dataclasses.fields(kind)}
        return kind(**{name: value for name, value in values.items() if name in names})

    past = SimpleNamespace(
        optimizer=section(OptimizerConfig, recipe.get("optimizer", {})),
        training=section(TrainingConfig, recipe.get("training", {})),
    )
    steps = -(-past.training.tokens // past.training.batch_tokens)
    given = past.optimizer.warmup_steps
    past.warmup_steps = derived_warmup(steps) if given is None else given
    return past


def refuse_jump(old: dict[str, Any], recipe: Recipe, where: Path, allowed: bool) -> str | None:
    """CheckpointError if the rate would jump up where a run goes on; one line if it changes otherwise, or is allowed to.

    old: the checkpoint's state, at `where`. A cosine that has ended is at its lowest rate; with more tokens the same step
    lies in the middle of another cosine.
    """
    tokens, past = old["tokens"], _past(old["recipe"])
    before, after = learning_rate(tokens, past), learning_rate(tokens, recipe)
    if abs(after - before) <= 0.01 * before:
        return None
    changed = [f"training.tokens {past.training.tokens:,} to {recipe.training.tokens:,}"]
    changed *= past.training.tokens != recipe.training.tokens
    for name in SCHEDULE:
        was, now = getattr(past.optimizer, name), getattr(recipe.optimizer, name)
        changed += [f"optimizer.{name} {was} to {now}"] if was != now else []
    text = f"the learning rate goes from {before:.3g} to {after:.3g} after {where} ({'; '.join(changed)})"
    if after <= JUMP * before or allowed:
        return text
    if recipe.optimizer.schedule == past.optimizer.schedule == "wsd":
        right = "go on from a checkpoint before the decay (docs/training.md)"
    else:
        right = f"start a new run from its weights, with a warm-up (--init-from {where})"
    raise CheckpointError(
        text.replace("goes", "would jump", 1), fix=f"{right}, keep the schedule, or accept it with --allow-rate-jump"
    )
