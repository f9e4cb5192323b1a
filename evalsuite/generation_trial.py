"""Tries generation settings with transformers on a model of a few weights, before the one that is meant is loaded.

Transformers has more settings than `generation_settings` has ranges for, and refuses many of their values only while it
generates: a stop string without a tokenizer, say, or a search that it would fetch from the hub.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from evalsuite.names import short
from tinyllama.errors import UserError, first_line

VOCABULARY = 1 << 18  # no smaller than those of the models that are evaluated: settings may name tokens
PROMPTS, PROMPT, GENERATED = 2, 12, 2  # two prompts: some searches are for one alone
ONE = ("num_beams", "num_return_sequences")  # which null stands for; transformers compares it with numbers
DECIMAL = ("temperature", "repetition_penalty")  # transformers takes neither 2 for 2.0 nor YAML's text "1e-1"


def as_transformers_takes(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, with numbers of the kinds that transformers wants. ValueError for what is no number."""
    ones = {name: 1 for name in ONE if name in settings and settings[name] is None}
    decimals = {name: float(settings[name]) for name in DECIMAL if settings.get(name) is not None}
    return {**settings, **ones, **decimals}


def refuse(settings: Mapping[str, Any]) -> None:
    """UserError where transformers cannot generate with these."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {
        "vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 1, "max_position_embeddings": PROMPT + GENERATED, "tie_word_embeddings": True,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**shape)).eval()
        prompts = torch.full((PROMPTS, PROMPT), 3)
        try:
            model.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                max_length=PROMPT + GENERATED,
                pad_token_id=0,
                **as_transformers_takes(settings),
            )
        except Exception as error:
            told = ", ".join(f"{name}={short(value)}" for name, value in settings.items())
            raise UserError(
                f"generation settings {told}: transformers refuses them ({first_line(error)[:200]})", fix="correct them"
            ) from error
