"""The recipe: what to train. A JSON file with these sections; unknown keys are refused. Torch-free.

Precedence: `--set key=value` over the recipe over the defaults below. The resolved recipe is written into the run
directory and into every checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import os
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinyllama import strict_json
from tinyllama.errors import ConfigError, nearest
from tinyllama.model.config import ModelConfig
from train import ranges

RECIPES = Path(__file__).parent / "recipes"
DEFAULT_RECIPE = RECIPES / "tinyllama_1.1b.json"
MAX_WARMUP_STEPS, WARMUP_SHARE = 2000, 0.1  # where a recipe leaves the warm-up open: TinyLlama's, or so much of the run


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """A token store in the data folder and its weight in the mixture, by tokens. `store` defaults to the name."""

    name: str
    weight: float
    store: str | None = None


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read, in which order. max_epochs: Muennighoff et al. (2023) find up to 4 epochs almost free.

    document_masking: attention stays inside a document, whose positions begin at 0; off, as in TinyLlama.
    """

    sources: tuple[SourceConfig, ...] = (SourceConfig("slimpajama", 0.7), SourceConfig("starcoder", 0.3))
    sequence_length: int = 2048
    seed: int = 3407
    max_epochs: float = 4.0
    document_masking: bool = False


@dataclasses.dataclass(frozen=True)
class KernelsConfig:
    """What computes what, by name; the best that this machine has where null (`tinyllama/model/kernels.py`)."""

    attention: str | None = None
    norm: str | None = None
    rotary: str | None = None
    swiglu: str | None = None
    loss: str | None = None


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """How long and in which portions, and how it is computed.

    micro_batch_sequences: sequences on one rank at a time; derived when null. compile: "block" compiles each layer (all
    share one compiled function, seconds), "whole" the whole model (minutes), null nothing. precision: of the matrix
    products of the blocks, "bf16" (the DeepSpeed file's own) or "fp8" (`tinyllama/model/fp8.py`). reduce_once: gradients are
    reduced over the ranks once a step, not after each micro-batch (ZeRO stages 2 and 3; every rank then holds all of them in
    fp32); where a GPU has room for that when null. deterministic: the same bits in every run on the same hardware, at the
    price of speed (`train/determinism.py`).
    """

    tokens: int = 3_000_000_000_000
    batch_tokens: int = 2_097_152
    micro_batch_sequences: int | None = None
    activation_checkpointing: bool = False
    reduce_once: bool | None = None
    compile: str | None = "block"
    deterministic: bool = False
    precision: str = "bf16"
    kernels: KernelsConfig = KernelsConfig()
    seed: int = 1337
    log_every_steps: int = 1


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule (`train/schedule.py`). Norms and the input embedding have no weight decay.

    warmup_steps: 2,000, but at most 10% of the run's steps, when null. schedule: "cosine" or "wsd" (warmup, stable, decay).
    Of wsd: the rate falls over the last decay_frac of the tokens, as decay_shape says: "linear", "cosine" or "1-sqrt".
    grad_clip: of the gradient's norm; 0 does not clip.
    """

    lr: float = 4e-4
    min_lr: float = 4e-5
    warmup_steps: int | None = None
    schedule: str = "cosine"
    decay_frac: float = 0.2
    decay_shape: str = "1-sqrt"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float = 1.0


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """How often, and over how many windows of each source at most, the validation loss is measured."""

    every_steps: int = 1000
    max_sequences: int = 512


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """lm-eval tasks on the model as it trains: how often (never when null), which, on how many items, from which bundle.

    batch_size: rows that a rank takes at a time.
    """

    every_steps: int | None = None
    tasks: str = "commonsense"
    limit: int | None = None
    data_dir: str | None = None
    batch_size: int = 16


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """How often a checkpoint is written, and which are kept: the newest, and every one of a multiple of keep_every_steps.

    background: the step waits only for a copy in host memory (12 bytes a parameter, divided by the ranks), which a
    thread then writes. proof: what a checkpoint proves of itself on loading (`train/proof.py`) is stored and checked.
    """

    every_steps: int = 1000
    keep_last: int = 3
    keep_every_steps: int | None = None
    background: bool = True
    proof: bool = True


@dataclasses.dataclass(frozen=True)
class HealthConfig:
    """What counts as sick, and what is done about it (`train/health.py`, `train/heartbeat.py`).

    A loss above median + spike_sigmas robust sigmas of the last spike_window steps is a spike. on_spike: "warn", "skip"
    (the weights do not move) or "rewind" (to the last checkpoint, leaving out every batch since). max_interventions: so
    many skips in a row, or rewinds to one checkpoint, end the run. frozen_after_steps: so many steps without a change of
    the weights do too. Heartbeats that stand still for hang_timeout_s end it with the stacks of all ranks; the first
    step, which compiles, has first_step_timeout_s.
    """

    on_spike: str = "warn"
    spike_sigmas: float = 6.0
    spike_window: int = 128
    max_interventions: int = 10
    frozen_after_steps: int = 100
    hang_timeout_s: float = 600.0
    first_step_timeout_s: float = 3600.0


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A whole training run, independent of the hardware. note: for people, such as where its numbers are from."""

    note: str | None = None
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    validation: ValidationConfig = ValidationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    health: HealthConfig = HealthConfig()

    def __post_init__(self) -> None:
        ranges.check(self)
        self._check_schedule()
        if self.data.sequence_length > self.model.max_position_embeddings:
            raise ConfigError(
                f"data.sequence_length={self.data.sequence_length} is above "
                f"model.max_position_embeddings={self.model.max_position_embeddings}",
                fix="raise max_position_embeddings",
            )
        every, keep = self.checkpoint.every_steps, self.checkpoint.keep_every_steps
        if keep is not None and keep % every:
            raise ConfigError(
                f"checkpoint.keep_every_steps={keep} is not a multiple of checkpoint.every_steps={every}",
                fix=f"nearest: {max(1, round(keep / every)) * every}",
            )
        names = [source.name for source in self.data.sources]
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"data.sources are named {names}", fix="give at least one source, each its own name")

    def _check_schedule(self) -> None:
        """A rate that is reached, and falls: warm-up and decay fit into the run."""
        opt, steps = self.optimizer, self.num_steps
        if opt.min_lr >= opt.lr:
            raise ConfigError(
                f"optimizer.min_lr={opt.min_lr} is not below optimizer.lr={opt.lr}", fix="lower min_lr, or raise lr"
            )
        if self.warmup_steps >= steps and self.warmup_steps:
            raise ConfigError(
                f"optimizer.warmup_steps={self.warmup_steps:,} of a run of {steps:,} steps: the rate would never arrive",
                fix=f"leave it out (null) for {derived_warmup(steps):,}, or train on more training.tokens",
            )
        if opt.schedule != "wsd":
            return
        decay = opt.decay_frac * steps
        if decay < 1 or (opt.decay_frac < 1 and self.warmup_steps + decay > steps):
            raise ConfigError(
                f"optimizer.decay_frac={opt.decay_frac:g} of {steps:,} steps, after optimizer.warmup_steps="
                f"{self.warmup_steps:,}",
                fix="let the decay have a step at least, and begin after the warm-up",
            )

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run: its tokens over its batch, rounded up."""
        return -(-self.training.tokens // self.training.batch_tokens)

    @property
    def warmup_steps(self) -> int:
        """Steps until the full rate: as given, or derived from the length of the run."""
        given = self.optimizer.warmup_steps
        return derived_warmup(self.num_steps) if given is None else given

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` gives the same recipe back."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """Build a recipe; ConfigError on an unknown key or a value of the wrong kind."""
        return typing.cast(Recipe, _build(cls, values, ""))


def derived_warmup(steps: int) -> int:
    """Warm-up steps of a run of `steps`, where the recipe leaves them open."""
    return min(MAX_WARMUP_STEPS, int(steps * WARMUP_SHARE))


def _build(kind: Any, value: Any, where: str) -> Any:
    """`value` (from JSON) as `kind`: a dataclass, a tuple, or a plain type, with unions of plain types."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ConfigError(f"{where or 'recipe'}={value!r} is not a JSON object", fix="correct the recipe")
        hints = typing.get_type_hints(kind)
        valid = [field.name for field in dataclasses.fields(kind)]
        for key in value:
            if key not in valid:
                path = f"{where}.{key}" if where else key
                raise ConfigError(f"{path} is not a recipe setting", fix=nearest(key, valid))
        needed = [f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING]
        for name in needed:
            if name not in value:
                raise ConfigError(f"{where}.{name} is missing".removeprefix("."), fix=f"give {', '.join(needed)}")
        built = {k: _build(hints[k], v, f"{where}.{k}" if where else k) for k, v in value.items()}
        try:
            return kind(**built)  # type: ignore[operator]
        except TypeError as error:
            raise ConfigError(f"{where or 'recipe'}: {error}", fix="correct the recipe") from None
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where}={value!r} is not a list", fix="give a list")
        return tuple(_build(arguments[0], entry, f"{where}[{i}]") for i, entry in enumerate(value))
    options = arguments if origin in (typing.Union, types.UnionType) else (kind,)
    for option in options:
        if option is type(None) and value is None:
            return None
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value) if abs(value) < 1e300 else value  # the range refuses the rest
        # Token counts read better as 3e12, which JSON makes a float.
        if option is int and isinstance(value, float) and value.is_integer():
            return int(value)
        if isinstance(option, type) and isinstance(value, option) and not (option is int and isinstance(value, bool)):
            return value
    expected = " or ".join("null" if o is type(None) else o.__name__ for o in options)
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    fix = f"give {' or '.join(names.get(option, expected) for option in options)}"
    raise ConfigError(f"{where}={value!r} is not of type {expected}", fix=fix)


def parse_settings(settings: Sequence[str]) -> list[tuple[list[str], Any]]:
    """`a.b=value` strings to paths and JSON values (a bare word is a string)."""
    parsed = []
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {setting}", fix="write --set section.key=value")
        try:
            value = strict_json.parse(text)
        except json.JSONDecodeError:
            value = text
        except ValueError as error:
            raise ConfigError(
                f"--set {setting}: {error}", fix="give a finite number, or other JSON in one reading"
            ) from None
        parsed.append((key.split("."), value))
    return parsed


def load_recipe(path: str | Path | None = None, settings: Sequence[str] = ()) -> Recipe:
    """The recipe in a JSON file (or of that name among those shipped), with `--set` settings laid over it."""
    file = DEFAULT_RECIPE if path is None else Path(path)
    if not os.path.exists(file) and os.path.exists(RECIPES / f"{file.name}.json"):
        file = RECIPES / f"{file.name}.json"
    shipped = sorted(p.stem for p in RECIPES.glob("*.json"))
    values = strict_json.read_object(file, "recipe", missing=nearest(file.name.removesuffix(".json"), shipped))
    for keys, value in parse_settings(settings):
        section = values
        for key in keys[:-1]:
            section = section.setdefault(key, {})
            if not isinstance(section, dict):
                raise ConfigError(f"--set {'.'.join(keys)}: {key} is not a section", fix="see the recipe's sections")
        section[keys[-1]] = value
    return Recipe.from_dict(values)
