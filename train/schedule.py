"""The learning rate as a pure function of tokens seen. Torch-free.

Linear warmup, then either half a cosine down to `min_lr` (as TinyLlama's `pretrain/tinyllama.py`, but for its first step,
whose rate was zero), or WSD: the full rate until the last `decay_frac` of the tokens, and down to `min_lr` over those (Hu
et al., 2024, MiniCPM; "1-sqrt" is Haegele et al., 2024). No scheduler object: a resume or another batch size cannot put it
out of step.
"""

from __future__ import annotations

import math

from train.recipe import Recipe

DECAYS = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "1-sqrt": lambda progress: 1 - math.sqrt(progress),
}


def learning_rate(tokens_seen: int, recipe: Recipe) -> float:
    """The rate of the step that starts after `tokens_seen` tokens.

    Warmup step k of n has lr * (k + 1) / n; step n is the first after it and has the full rate; at the end of training,
    and after it, the rate is min_lr.
    """
    opt, batch, total = recipe.optimizer, recipe.training.batch_tokens, recipe.training.tokens
    warmup = opt.warmup_steps * batch
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
