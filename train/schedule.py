"""The learning rate as a pure function of tokens seen. Torch-free.

Linear warmup, then half a cosine down to `min_lr` (as TinyLlama's `pretrain/tinyllama.py`, but for its first step,
whose rate was zero). No scheduler object: a resume or another batch size cannot put it out of step.
"""

from __future__ import annotations

import math

from train.recipe import Recipe


def learning_rate(tokens_seen: int, recipe: Recipe) -> float:
    """The rate of the step that starts after `tokens_seen` tokens.

    Warmup step k of n has lr * (k + 1) / n; step n is the first of the cosine and has the full rate; at the end of
    training, and after it, the rate is min_lr.
    """
    opt, batch = recipe.optimizer, recipe.training.batch_tokens
    warmup = opt.warmup_steps * batch
    if tokens_seen < warmup:
        return opt.lr * (tokens_seen + batch) / warmup
    total = recipe.training.tokens
    if tokens_seen >= total:
        return opt.min_lr
    progress = (tokens_seen - warmup) / (total - warmup)
    return opt.min_lr + 0.5 * (opt.lr - opt.min_lr) * (1 + math.cos(math.pi * progress))
