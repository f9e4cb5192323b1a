"""What a run will need, from its shape alone: memory of a rank, bytes that travel, time. Torch-free arithmetic.

N is the number of parameters, R of ranks. Weights travel and are computed with in bf16 (2 bytes), gradients are summed in
fp32 (4 bytes), AdamW keeps fp32 weights and two moments (12 bytes). Rajbhandari et al. (2020) is the source of what each
stage shares out: 1 the optimizer, 2 also the gradients, 3 also the weights.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tinyllama import hardware
from tinyllama.model.config import ModelConfig

WEIGHT_BYTES, GRADIENT_BYTES, OPTIMIZER_BYTES = 2, 4, 12
BUS_GIGABYTES_PER_S = 25.0  # between a GPU and its host: PCIe 4.0 x16, measured rates


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one rank. activations is an estimate (what a compiled block keeps for its backward pass)."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def activation_bytes(model: ModelConfig, tokens: int, checkpointing: bool) -> int:
    """bf16 tensors kept for the backward pass of `tokens` positions on one rank, flash attention assumed.

    A block keeps both residual inputs, both norms' outputs, q, rotated q and the attention's output (7 hidden), k, rotated k
    and v (3 key/value), gate, up and their product (3 feed-forward). With checkpointing, its input, and one block at a time.
    """
    block = 2 * (7 * model.hidden_size + 3 * model.kv_dim + 3 * model.intermediate_size)
    kept = block + 2 * model.hidden_size * model.num_hidden_layers if checkpointing else block * model.num_hidden_layers
    return tokens * kept


def memory(
    model: ModelConfig,
    stage: int,
    ranks: int,
    micro_tokens: int,
    checkpointing: bool = False,
    offload: bool = False,
    machine_ranks: int = 1,
) -> Memory:
    """Memory of one rank under a ZeRO stage (0 shares nothing out). offload: the optimizer lives in host memory.

    machine_ranks: above 1, stage 3 keeps a second copy of the weights, shared out among so many ranks (ZeRO++'s hpZ).
    """
    n = model.num_parameters
    second = -(-n * WEIGHT_BYTES // machine_ranks) if stage == 3 and machine_ranks > 1 else 0

    def shared(from_stage: int, size: int) -> int:
        return -(-n * size // ranks) if stage >= from_stage else n * size

    return Memory(
        weights=shared(3, WEIGHT_BYTES) + second,
        gradients=shared(2, GRADIENT_BYTES),
        optimizer=0 if offload else shared(1, OPTIMIZER_BYTES),
        activations=activation_bytes(model, micro_tokens, checkpointing),
    )


def bytes_per_step(model: ModelConfig, stage: int, ranks: int, accumulation: int, machine_ranks: int = 1) -> int:
    """Bytes that one rank sends in an optimizer step, in bf16, each collective in its ring form ((R - 1) / R of a tensor).

    Stage 3: every micro-step gathers the weights twice and scatters gradients once. Stage 2: gradients are scattered every
    micro-step, weights gathered once. Stage 1 (and 0): both once, at the end of the accumulation. With hpZ (machine_ranks
    above 1) the backward pass of stage 3 gathers inside the machine, which is not counted: a third less.
    """
    of_stage_3 = (2 if machine_ranks > 1 else 3) * accumulation
    passes = {3: of_stage_3, 2: accumulation + 1}.get(stage, 2)
    return passes * WEIGHT_BYTES * model.num_parameters * (ranks - 1) // ranks


def bus_bytes_per_step(model: ModelConfig, ranks: int, offload: bool) -> int:
    """Bytes between a rank and its host in an optimizer step: with the optimizer there, gradients down and weights up."""
    return -(-model.num_parameters * (GRADIENT_BYTES + WEIGHT_BYTES) // ranks) if offload else 0


def estimate(
    model: ModelConfig,
    *,
    tokens: int,
    sequence_length: int,
    micro: int,
    accumulation: int,
    ranks: int,
    stage: int,
    checkpointing: bool = False,
    offload: bool = False,
    machine_ranks: int = 1,
    device: str = "H100",
    mfu: float = 0.4,
    gigabytes_per_s: float = 50.0,
) -> dict[str, Any]:
    """Everything that `tinyllama train --dry-run` says, JSON-ready.

    machine_ranks: the ranks of a machine where the JSON asks for hpZ, else 1. mfu: the share of the device's peak that is
    assumed. gigabytes_per_s: what one rank can send. `stages` has each stage's memory, traffic and step time, computation
    and traffic not overlapped: the pessimist's order, which is what stages are compared by. `advice` names a stage that
    fits and is more than 5% faster; None where there is none.
    """
    limits = hardware.named(device)
    flops = {name: model.flops_per_token(sequence_length, name) for name in ("full", "all_parameters", "causal")}
    step_tokens = micro * accumulation * ranks * sequence_length
    compute_s = step_tokens * flops["full"] / (limits.flops_per_s * mfu * ranks)
    stages: dict[int, dict[str, Any]] = {}
    for number in (1, 2, 3):
        need = memory(model, number, ranks, micro * sequence_length, checkpointing, offload, machine_ranks)
        traffic = bytes_per_step(model, number, ranks, accumulation, machine_ranks)
        bus = bus_bytes_per_step(model, ranks, offload)
        stages[number] = {
            "memory_bytes": {**dataclasses.asdict(need), "total": need.total},
            "fits": need.total <= 0.92 * limits.memory_bytes,  # what allocators and libraries leave
            "bytes_per_step": traffic,
            "bus_bytes_per_step": bus,
            "step_s": compute_s + traffic / (gigabytes_per_s * 1e9) + bus / (BUS_GIGABYTES_PER_S * 1e9),
        }
    chosen = stages[stage]["step_s"]
    best = min((s for s in stages if stages[s]["fits"]), key=lambda s: (stages[s]["step_s"], s), default=stage)
    return {
        "parameters": model.num_parameters,
        "flops_per_token": flops,
        "total_flops": tokens * flops["full"],
        "tokens": tokens,
        "step_tokens": step_tokens,
        "device": limits.name,
        "assumed_mfu": mfu,
        "assumed_gigabytes_per_s": gigabytes_per_s,
        "stage": stage,
        "stages": stages,
        "days": tokens / step_tokens * chosen / 86400,
        "device_hours": tokens / step_tokens * chosen / 3600 * ranks,
        "advice": best if stages[best]["step_s"] < 0.95 * chosen else None,
    }
