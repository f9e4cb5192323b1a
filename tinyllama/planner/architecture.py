"""A real Llama near a wanted number of parameters, and a recipe that trains it. Pure arithmetic over `ModelConfig`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from tinyllama.errors import ConfigError
from tinyllama.model.config import ModelConfig
from tinyllama.planner import learning_rate

FFN_MULTIPLE = 256
MOST_LAYERS = 160
# hidden_size / num_hidden_layers: TinyLlama 93, Llama 7B 128. The loss is flat in it from about 50 to 200 (Kaplan et al.
# 2020, figure 5), so that a shape is chosen by its size first, and among equals by this.
ASPECT = 96.0
MAX_BATCH_TOKENS = 2_097_152  # TinyLlama's
FEWEST_STEPS = 5_000


def shape(hidden_size: int, layers: int, vocab_size: int) -> ModelConfig:
    """Heads of 64 up to a width of 2048, of 128 above; FFN 8/3 of the width, rounded up.

    Up to 8 query heads share a key/value head, of which there are 4 at least.
    """
    head_dim = 64 if hidden_size <= 2048 else 128
    heads = hidden_size // head_dim
    group = max(g for g in range(1, 9) if heads % g == 0 and (g == 1 or heads >= 4 * g))
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=math.ceil(hidden_size * 8 / 3 / FFN_MULTIPLE) * FFN_MULTIPLE,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // group,
    )


def propose(params: float, vocab_size: int = 32000) -> ModelConfig:
    """The shape nearest to `params` whose depth and width are in proportion. ConfigError where none is within 10%."""
    best, best_score = None, math.inf
    for hidden_size in (*range(64, 2048, 64), *range(2048, 32769, 128)):
        for layers in _layers_near(hidden_size, params, vocab_size):
            model = shape(hidden_size, layers, vocab_size)
            off = abs(math.log(model.num_parameters / params))
            # 1% of size weighs as much as 10% of proportion, or a third of a halved group of query heads.
            score = off + 0.1 * abs(math.log(hidden_size / layers / ASPECT))
            score += 0.03 * math.log2(8 * model.num_key_value_heads / model.num_attention_heads)
            if off < math.log(1.1) and score < best_score:
                best, best_score = model, score
    if best is None:
        raise ConfigError(
            f"no Llama with a vocabulary of {vocab_size:,} has {params:.3g} parameters within 10%",
            fix="give another --vocab-size, or plan for another size",
        )
    return best


def _layers_near(hidden_size: int, params: float, vocab_size: int) -> list[int]:
    """The two depths that bring this width nearest to `params`."""
    one, two = (shape(hidden_size, layers, vocab_size).num_parameters for layers in (1, 2))
    exact = 1 + (params - one) / (two - one)
    return [layers for layers in (math.floor(exact), math.ceil(exact)) if 1 <= layers <= MOST_LAYERS]


def recipe(model: ModelConfig, tokens: float, max_epochs: float) -> dict[str, Any]:
    """A recipe for `tinyllama train`; sources and the rest stay that command's defaults, TinyLlama's.

    The batch is TinyLlama's, or where that would be fewer than 5,000 steps the power of two that gives as many. The learning
    rate is that of the size, by the rule in the recipe's note; the warm-up is derived from the length.
    """
    batch = min(MAX_BATCH_TOKENS, 2 ** int(math.log2(max(tokens / FEWEST_STEPS, model.max_position_embeddings))))
    rate = learning_rate.describe(model.num_parameters, tokens)
    return {
        "note": rate["text"],
        "model": model.to_dict(),
        "data": {"sequence_length": model.max_position_embeddings, "max_epochs": max_epochs},
        "training": {"tokens": round(tokens), "batch_tokens": batch},
        "optimizer": {"lr": rate["lr"], "min_lr": rate["min_lr"]},
    }


def write_recipe(values: dict[str, Any], path: Path) -> None:
    """Write it; a file that exists is left alone."""
    try:
        with open(path, "x") as stream:
            stream.write(json.dumps(values, indent=2) + "\n")
    except FileExistsError:
        raise ConfigError(f"--write-recipe {path} exists", fix="give another name, or remove it") from None
    except OSError as error:
        raise ConfigError(
            f"--write-recipe {path}: {error.strerror}", fix="give a file in a folder that exists"
        ) from None
