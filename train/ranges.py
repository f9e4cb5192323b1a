"""What each field of a recipe may be: one row a field, its kind and its range. Torch-free.

`RECIPE` has a row for every field (a test walks the dataclasses); `check` is called for every recipe, however it was made.
What fields say of one another is in `train/recipe.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tinyllama.errors import ConfigError, nearest

SPIKE_POLICIES = ("warn", "skip", "rewind")
SCHEDULES = ("cosine", "wsd")
DECAY_SHAPES = ("linear", "cosine", "1-sqrt")
COMPILE = ("block", "whole")
PRECISIONS = ("bf16", "fp8")
KERNELS = {  # names; what they need and which is chosen by itself: tinyllama/model/kernels.py
    "attention": ("flash-attn-4", "flash-attn-3", "flash-attn-2", "cudnn", "flex", "sdpa", "blocked"),
    "norm": ("liger", "torch"),
    "rotary": ("liger", "torch"),
    "swiglu": ("liger", "torch"),
    "loss": ("liger", "chunked"),
}


class Rule:
    """What a value may be. `refusal` is None for a good value, else what would be."""

    def refusal(self, value: Any) -> str | None:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Whole(Rule):
    """A whole number from `low` to `high`."""

    low: int
    high: int

    def refusal(self, value: Any) -> str | None:
        good = isinstance(value, int) and not isinstance(value, bool) and self.low <= value <= self.high
        return None if good else f"give a whole number from {self.low:,} to {self.high:,}"


@dataclasses.dataclass(frozen=True)
class Real(Rule):
    """A finite number from `low` to `high`; ends: "(" and ")" leave that end out."""

    low: float
    high: float
    ends: str = "[]"

    def refusal(self, value: Any) -> str | None:
        if isinstance(value, int | float) and not isinstance(value, bool):  # NaN is in no range
            above = self.low < value if self.ends[0] == "(" else self.low <= value
            if above and (value < self.high if self.ends[1] == ")" else value <= self.high):
                return None
        low = f"above {self.low:g}" if self.ends[0] == "(" else f"of {self.low:g} or more"
        return f"give a finite number {low}, {'below' if self.ends[1] == ')' else 'up to'} {self.high:g}"


@dataclasses.dataclass(frozen=True)
class Reals(Rule):
    """A list of `count` numbers, each in `each`."""

    count: int
    each: Real

    def refusal(self, value: Any) -> str | None:
        good = isinstance(value, list | tuple) and len(value) == self.count
        if good and all(self.each.refusal(entry) is None for entry in value):
            return None
        number = (self.each.refusal("") or "").removeprefix("give ")
        return f"give a list of {self.count}, each {number}"


@dataclasses.dataclass(frozen=True)
class Flag(Rule):
    """true or false."""

    def refusal(self, value: Any) -> str | None:
        return None if isinstance(value, bool) else "give true or false"


@dataclasses.dataclass(frozen=True)
class OneOf(Rule):
    """One of these."""

    names: tuple[Any, ...]

    def refusal(self, value: Any) -> str | None:
        if any(value == name and type(value) is type(name) for name in self.names):
            return None
        if isinstance(value, str) and all(isinstance(name, str) for name in self.names):
            return nearest(value, list(self.names))
        return f"valid: {', '.join(map(str, self.names))}"


@dataclasses.dataclass(frozen=True)
class Text(Rule):
    """A name or a path: not empty, in one line, of at most `most` characters."""

    most: int = 4096

    def refusal(self, value: Any) -> str | None:
        if isinstance(value, str) and value.strip() and len(value) <= self.most and value.isprintable():
            return None
        return f"give text of 1 to {self.most:,} characters, in one line"


@dataclasses.dataclass(frozen=True)
class Optional(Rule):
    """The same, or null."""

    rule: Rule

    def refusal(self, value: Any) -> str | None:
        refusal = None if value is None else self.rule.refusal(value)
        return f"{refusal}, or null" if refusal and refusal.startswith("give") else refusal


STEPS, SEED = Whole(1, 10**9), Whole(0, 2**63 - 1)
TOKENS = 9 * 10**15  # below 2^53: what is written as 3e12 is exactly that number
SECONDS = Real(0, 1e9, "(]")

RECIPE: dict[str, Rule] = {
    "note": Optional(Text()),
    "model.vocab_size": Whole(2, 1 << 24),
    "model.hidden_size": Whole(2, 1 << 20),
    "model.intermediate_size": Whole(1, 1 << 22),
    "model.num_hidden_layers": Whole(1, 10_000),
    "model.num_attention_heads": Whole(1, 1 << 16),
    "model.num_key_value_heads": Whole(1, 1 << 16),
    "model.max_position_embeddings": Whole(1, 1 << 24),
    "model.rms_norm_eps": Real(0, 1, "()"),
    "model.rope_theta": Real(1, 1e12),
    "model.initializer_range": Real(0, 10, "(]"),
    "data.sources.name": Text(200),
    "data.sources.weight": Real(0, 1e12, "(]"),
    "data.sources.store": Optional(Text()),
    "data.sequence_length": Whole(1, 1 << 24),
    "data.seed": SEED,
    "data.max_epochs": Real(0, 1e9, "(]"),
    "data.document_masking": Flag(),
    "training.tokens": Whole(1, TOKENS),
    "training.batch_tokens": Whole(1, 1 << 40),
    "training.micro_batch_sequences": Optional(Whole(1, 1 << 20)),
    "training.activation_checkpointing": Flag(),
    "training.reduce_once": Optional(Flag()),
    "training.compile": Optional(OneOf(COMPILE)),
    "training.deterministic": Flag(),
    "training.precision": OneOf(PRECISIONS),
    **{f"training.kernels.{operation}": Optional(OneOf(names)) for operation, names in KERNELS.items()},
    "training.seed": SEED,
    "training.log_every_steps": STEPS,
    "optimizer.lr": Real(0, 1, "(]"),
    "optimizer.min_lr": Real(0, 1),
    "optimizer.warmup_steps": Optional(Whole(0, 10**9)),
    "optimizer.schedule": OneOf(SCHEDULES),
    "optimizer.decay_frac": Real(0, 1, "(]"),
    "optimizer.decay_shape": OneOf(DECAY_SHAPES),
    "optimizer.betas": Reals(2, Real(0, 1, "[)")),
    "optimizer.eps": Real(0, 1, "(]"),
    "optimizer.weight_decay": Real(0, 10),
    "optimizer.grad_clip": Real(0, 1e6),
    "validation.every_steps": STEPS,
    "validation.max_sequences": Whole(1, 10**12),
    "evaluation.every_steps": Optional(STEPS),
    "evaluation.tasks": Text(),
    "evaluation.limit": Optional(Whole(1, 10**9)),
    "evaluation.data_dir": Optional(Text()),
    "evaluation.batch_size": Whole(1, 1 << 20),
    "checkpoint.every_steps": STEPS,
    "checkpoint.keep_last": Whole(1, 10**9),
    "checkpoint.keep_every_steps": Optional(STEPS),
    "checkpoint.background": Flag(),
    "checkpoint.proof": Flag(),
    "health.on_spike": OneOf(SPIKE_POLICIES),
    "health.spike_sigmas": Real(0, 1e6, "(]"),
    "health.spike_window": Whole(2, 1 << 20),
    "health.max_interventions": Whole(1, 10**9),
    "health.frozen_after_steps": STEPS,
    "health.hang_timeout_s": SECONDS,
    "health.first_step_timeout_s": SECONDS,
}


def check(section: Any, rules: Mapping[str, Rule] = RECIPE, path: str = "", shown: str = "") -> None:
    """ConfigError for the first field of a dataclass (and those in it) that its rule refuses.

    path: the section's name in `rules`; shown: in messages, where a list has its index.
    """
    for field in dataclasses.fields(section):
        value, key = getattr(section, field.name), f"{path}.{field.name}" if path else field.name
        name = f"{shown}.{field.name}" if shown else field.name
        if dataclasses.is_dataclass(value):
            check(value, rules, key, name)
        elif isinstance(value, tuple) and value and all(map(dataclasses.is_dataclass, value)):
            for index, entry in enumerate(value):
                check(entry, rules, key, f"{name}[{index}]")
        elif key in rules and (refusal := rules[key].refusal(value)):
            raise ConfigError(f"{name}={value!r}", fix=refusal)
        elif key not in rules and value != ():  # a section that is not one
            raise ConfigError(f"{name}={value!r} is not a section", fix="correct the recipe")
