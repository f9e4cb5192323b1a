"""The numbers of a run before it is launched: batch plan, epochs, resolved DeepSpeed JSON. Torch-free.

`batch_tokens = micro x accumulation x ranks x sequence_length`, always; impossible combinations are refused with all
the numbers. The DeepSpeed JSON must leave to the recipe what the recipe says (batch, clipping, optimizer, schedule).
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinyllama import hardware
from tinyllama.data.loader import Mixture, Source
from tinyllama.errors import ConfigError, DataError
from tinyllama.model.config import ModelConfig
from train.deepspeed_json import read_deepspeed as read_deepspeed
from train.estimate import (
    USABLE,
    Memory,
    advice,
    block_activation_bytes,
    block_parameters,
    estimate,
    memory,
    reduce_bucket,
)
from train.recipe import Recipe

# Positions at once where the memory of a device is not known, as on a CPU. A recipe or the JSON can say otherwise.
MICRO_BATCH_TOKENS = 16384
# More at once makes nothing faster, and tensors of more than 2^31 elements are beyond what many kernels index.
MAX_MICRO_BATCH_TOKENS = 131072


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """How one optimizer step's sequences are divided: micro x accumulation x ranks = sequences.

    reduce_once: under stages 2 and 3, gradients are reduced at the end of the step, not after each micro-batch.
    """

    micro: int
    accumulation: int
    ranks: int
    sequence_length: int
    reduce_once: bool = False

    @property
    def sequences(self) -> int:
        return self.micro * self.accumulation * self.ranks

    @property
    def tokens(self) -> int:
        return self.sequences * self.sequence_length

    @property
    def division(self) -> dict[str, Any]:
        """What the order of a step's sums depends on, for its checkpoints."""
        return {
            "micro": self.micro,
            "accumulation": self.accumulation,
            "ranks": self.ranks,
            "reduce_once": self.reduce_once,
        }

    def samples(self, step: int, rank: int, micro_step: int) -> range:
        """Sample numbers that `rank` reads in one micro-step. The step's set is the same for any division."""
        first = step * self.sequences + (micro_step * self.ranks + rank) * self.micro
        return range(first, first + self.micro)

    def __str__(self) -> str:
        return (
            f"micro {self.micro} x accumulation {self.accumulation} x ranks {self.ranks} x "
            f"{self.sequence_length} tokens = {self.tokens:,} tokens a step"
        )


def plan_batch(
    recipe: Recipe, ranks: int, micro: int | None = None, fits: Callable[[int], bool] | None = None
) -> BatchPlan:
    """Divide the recipe's batch over `ranks`. micro: from the recipe or the JSON; derived when None.

    fits: whether a device has room for a micro-batch of so many sequences; MICRO_BATCH_TOKENS decides when None.
    """
    length, batch = recipe.data.sequence_length, recipe.training.batch_tokens
    unit = ranks * length * (micro or 1)
    if batch % unit:
        raise ConfigError(
            f"training.batch_tokens={batch:,} is not a multiple of micro {micro or 1} x seq {length} x ranks {ranks} "
            f"= {unit:,}",
            fix=f"nearest: {max(1, round(batch / unit)) * unit:,}",
        )
    share = batch // (ranks * length)  # sequences a rank sees in a step
    if micro is None:
        most = max(1, (MAX_MICRO_BATCH_TOKENS if fits else MICRO_BATCH_TOKENS) // length)
        fitting = [d for d in range(1, min(share, most) + 1) if share % d == 0 and (not fits or fits(d))]
        micro = max(fitting, default=1)
    return BatchPlan(micro, share // micro, ranks, length)


def resolve_deepspeed(
    config: dict[str, Any],
    recipe: Recipe,
    ranks: int,
    ranks_per_node: int | None = None,
    free_bytes: int | None = None,
    began: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], BatchPlan]:
    """The JSON with every "auto" resolved, and the batch plan. Contradictions with the recipe are refused.

    ranks_per_node: on each machine; all of them when None. free_bytes: of each rank's GPU; None on a CPU. began: what a
    resumed run's checkpoint says of its division (`BatchPlan.division`); on as many ranks it stays, where it fits, for the
    order of the sums depends on it.
    """
    resolved = copy.deepcopy(config)
    zero = resolved["zero_optimization"]
    if (
        zero.get("zero_hpz_partition_size", 1) == "auto"
    ):  # a second copy of the weights in each machine; 1 where one only
        zero["zero_hpz_partition_size"] = ranks_per_node if ranks_per_node and ranks_per_node < ranks else 1
    if ranks % (parts := zero.get("zero_hpz_partition_size", 1)):
        raise ConfigError(
            f"DeepSpeed JSON: zero_hpz_partition_size={parts} does not divide {ranks} ranks", fix='set it to "auto"'
        )
    given, micro = resolved.get("train_micro_batch_size_per_gpu", "auto"), recipe.training.micro_batch_sequences
    if micro and given not in ("auto", micro):
        raise ConfigError(
            f"DeepSpeed JSON: train_micro_batch_size_per_gpu={given}, the recipe gives {micro}", fix='set it to "auto"'
        )
    micro = micro or (None if given == "auto" else given)
    wanted, stage, offload = recipe.training.reduce_once, zero["stage"], "offload_optimizer" in zero

    def fits(micro: int, once: bool) -> bool:
        return free_bytes is not None and need(resolved, recipe, ranks, micro, once).total <= USABLE * free_bytes

    if began and micro is None and began["ranks"] == ranks and fits(began["micro"], began["reduce_once"]):
        micro, wanted = began["micro"], began["reduce_once"] if wanted is None else wanted
    once = wanted is True and stage > 1
    plan = plan_batch(recipe, ranks, micro, None if free_bytes is None else lambda micro: fits(micro, once))
    once = reduces_once(wanted, stage, plan.accumulation, offload, room=fits(plan.micro, True))
    plan = dataclasses.replace(plan, reduce_once=once)
    ours = {
        "train_batch_size": plan.sequences,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": recipe.optimizer.grad_clip,
    }
    for key, value in ours.items():
        if resolved.get(key, "auto") not in ("auto", value):
            raise ConfigError(
                f"DeepSpeed JSON: {key}={resolved[key]}, the recipe gives {value}", fix='set it to "auto"'
            )
    for key, value in bucket_sizes(recipe.model, stage, on_gpu=free_bytes is not None).items():
        if zero.get(key, "auto") == "auto":
            zero[key] = value
    bf16 = resolved.get("bf16", {})
    # With this off DeepSpeed steps on a gradient that is not finite (stages 1 and 2).
    if bf16.get("enabled") and not bf16.setdefault("check_grad_overflow", True):
        raise ConfigError("DeepSpeed JSON: bf16.check_grad_overflow=false lets NaN into the weights", fix="remove it")
    resolved.update(ours, train_micro_batch_size_per_gpu=plan.micro)
    for key, value in _leaves(resolved):
        if value == "auto":
            raise ConfigError(f'DeepSpeed JSON: {key}="auto" cannot be derived', fix="give a value")
    # DeepSpeed accumulates in the model's dtype unless told otherwise; in bf16 small gradients would vanish.
    resolved.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    # Its timer waits for the device before and after every micro-step; `metrics.jsonl` has the throughput.
    resolved.setdefault("timers", {}).setdefault("throughput", {}).setdefault("enabled", False)
    return resolved, plan


def bucket_sizes(model: ModelConfig, stage: int, on_gpu: bool) -> dict[str, int]:
    """What is reduced and gathered at a time, in elements, for what the JSON leaves "auto".

    On a GPU a block is gathered as one while the block before it computes, and gradients are reduced in few large parts. On
    a CPU, Hugging Face's rule: buckets stay in its caches. DeepSpeed's own defaults suit models ten times as large.
    """
    square = model.hidden_size**2
    sizes = {"reduce_bucket_size": reduce_bucket(model) if on_gpu else square}
    if stage == 3:
        sizes["stage3_prefetch_bucket_size"] = max(int(0.9 * square), block_parameters(model) if on_gpu else 0)
        sizes["stage3_param_persistence_threshold"] = 10 * model.hidden_size
    return sizes


def reduces_once(wanted: bool | None, stage: int, accumulation: int, offload: bool, room: bool) -> bool:
    """Whether gradients are reduced at the end of a step alone (`train/accumulation.py`), given `training.reduce_once`.

    Stage 1 always does so, and with one micro-batch a step there is nothing to choose. Where the recipe leaves it open, it
    is done where a GPU has `room` for all gradients in fp32 beside its micro-batch, and the optimizer lives there too.
    """
    if stage == 1 or accumulation == 1:
        return False
    return (room and not offload) if wanted is None else wanted


def need(deepspeed: dict[str, Any], recipe: Recipe, ranks: int, micro: int, reduce_once: bool) -> Memory:
    """What a rank's device has to hold, under a JSON whose "zero_hpz_partition_size" is resolved."""
    zero = deepspeed["zero_optimization"]
    return memory(
        recipe.model,
        zero["stage"],
        ranks,
        micro * recipe.data.sequence_length,
        recipe.training.activation_checkpointing,
        "offload_optimizer" in zero,
        zero.get("zero_hpz_partition_size", 1),
        compiled=recipe.training.compile is not None,
        reduce_once=reduce_once,
    )


def describe_memory(deepspeed: dict[str, Any], recipe: Recipe, plan: BatchPlan, free_bytes: int) -> str:
    """One line: the micro-batch, what it needs of what there is, and when gradients are reduced."""
    total = need(deepspeed, recipe, plan.ranks, plan.micro, plan.reduce_once).total
    kept = block_activation_bytes(recipe.model, recipe.training.compile is not None)
    again = ", computed again in the backward pass" if recipe.training.activation_checkpointing else ""
    once = plan.reduce_once or plan.accumulation == 1 or deepspeed["zero_optimization"]["stage"] == 1
    tight = total > USABLE * free_bytes
    return (
        f"micro {plan.micro}: {total / 1e9:.1f} of {free_bytes / 1e9:.0f} GB (an estimate); activations {kept / 1e3:.1f} KB "
        f"a token and layer{again}; gradients are reduced {'once a step' if once else f'{plan.accumulation} times a step'}"
        + ("; it may not fit: see training.activation_checkpointing, and other ZeRO stages" if tight else "")
    )


def start_lines(
    deepspeed: dict[str, Any], recipe: Recipe, plan: BatchPlan, free_bytes: int | None, device: str
) -> list[str]:
    """What a run says of its memory and of its ZeRO stage as it starts. On a CPU the numbers would be another machine's."""
    if free_bytes is None:
        return ["gradients are reduced once a step"] if plan.reduce_once else []
    lines = [describe_memory(deepspeed, recipe, plan, free_bytes)]
    if (known := hardware.find(device)) is not None:
        zero = deepspeed["zero_optimization"]
        numbers = estimate(
            recipe.model,
            tokens=recipe.training.tokens,
            sequence_length=recipe.data.sequence_length,
            micro=plan.micro,
            accumulation=plan.accumulation,
            ranks=plan.ranks,
            stage=zero["stage"],
            checkpointing=recipe.training.activation_checkpointing,
            offload="offload_optimizer" in zero,
            machine_ranks=zero.get("zero_hpz_partition_size", 1),
            compiled=recipe.training.compile is not None,
            reduce_once=plan.reduce_once,
            device=known.name,
            free_bytes=free_bytes,
        )
        lines += [text] if (text := advice(numbers)) else []
    return lines


def _leaves(value: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [leaf for k, v in value.items() for leaf in _leaves(v, f"{path}.{k}" if path else k)]
    return [(path, value)]


def missing_store(recipe: Recipe, data: str | Path) -> str | None:
    """Which of the recipe's token stores is not there, and how to make it; None if all are."""
    for source in recipe.data.sources:
        directory = Path(data) / (source.store or source.name)
        if not os.path.lexists(directory / "manifest.json"):
            return (
                f"no token store for source {source.name!r} at {directory}; "
                f"tinyllama data prepare INPUT... --output {directory} --tokenizer FILE"
            )
    return None


def sources(recipe: Recipe, data: str | Path) -> list[Source]:
    """The recipe's sources as stores below the data folder; one line says how to make what is missing."""
    if missing := missing_store(recipe, data):
        raise DataError(missing)
    return [Source(s.name, Path(data) / (s.store or s.name), s.weight) for s in recipe.data.sources]


def open_mixture(recipe: Recipe, data: str | Path) -> Mixture:
    """The training mixture, checked against the recipe: vocabulary, and epochs below the cap for the whole run."""
    mixture = Mixture(sources(recipe, data), recipe.data.sequence_length, recipe.data.seed)
    if mixture.vocab_size != recipe.model.vocab_size:
        raise ConfigError(
            f"the stores' tokenizer has {mixture.vocab_size} pieces, model.vocab_size={recipe.model.vocab_size}",
            fix="prepare the data with the recipe's tokenizer, or set model.vocab_size",
        )
    samples = recipe.num_steps * (recipe.training.batch_tokens // recipe.data.sequence_length)
    mixture.check_epochs(samples, recipe.data.max_epochs)
    mixture.check_sizes()
    return mixture
