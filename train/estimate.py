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
USABLE = 0.9  # of a device's free memory: the rest is for the allocator's gaps, libraries and communication
HEAD_CHUNK_TOKENS = 4096  # positions whose logits exist at once
LOGIT_BYTES = 8  # a logit in bf16 and in fp32, and its gradient in bf16
BUS_GIGABYTES_PER_S = 25.0  # between a GPU and its host: PCIe 4.0 x16, measured rates


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one rank. activations and working are estimates.

    activations: what is kept for the backward pass. working: what exists for a while beside it, gradients before they are
    summed or the logits of a chunk.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    working: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.working


def block_activation_bytes(model: ModelConfig, compiled: bool = True) -> int:
    """Bytes of a token that one block keeps for its backward pass, flash attention assumed (no score is kept).

    Compiled, 6 tensors of the hidden size, 2 of the key/value heads', 3 of the feed-forward size; 10, 2 and 4 where nothing
    is compiled (the norms' fp32 values, silu's output); all in bf16, and a fp32 log-sum of each head. The counts are those
    that give what was measured at the 1.1B shape, 59.5 and 87.2 KB, within 0.1%; at other shapes they are an estimate.
    """
    hidden, feed_forward = (6, 3) if compiled else (10, 4)
    values = hidden * model.hidden_size + 2 * model.kv_dim + feed_forward * model.intermediate_size
    return 2 * values + 4 * model.num_attention_heads


def activation_bytes(model: ModelConfig, tokens: int, checkpointing: bool, compiled: bool = True) -> int:
    """What is kept for the backward pass of `tokens` positions on one rank.

    With checkpointing, each block's input, and one block at a time. Outside of the blocks: the embedding's output, the last
    norm's input and output, and the gradient that the head hands down.
    """
    block = block_activation_bytes(model, compiled)
    kept = block + 2 * model.hidden_size * model.num_hidden_layers if checkpointing else block * model.num_hidden_layers
    return tokens * (kept + 4 * 2 * model.hidden_size)


def working_bytes(model: ModelConfig, stage: int, reduce_once: bool, bucket: int) -> int:
    """The larger of what exists before the backward pass of the blocks (a chunk of logits, the head's gradient in fp32) and
    at its end: stage 1's gradients of a micro-batch in bf16, or two buckets of `bucket` elements.

    reduce_once (stages 2 and 3): the step's gradients in fp32, of all parameters, exist during both.
    """
    head = HEAD_CHUNK_TOKENS * model.vocab_size * LOGIT_BYTES + 4 * model.vocab_size * model.hidden_size
    n = model.num_parameters
    return max(head, n * WEIGHT_BYTES if stage <= 1 else 2 * bucket * WEIGHT_BYTES) + (n * 4 if reduce_once else 0)


def memory(
    model: ModelConfig,
    stage: int,
    ranks: int,
    micro_tokens: int,
    checkpointing: bool = False,
    offload: bool = False,
    machine_ranks: int = 1,
    compiled: bool = True,
    reduce_once: bool = False,
) -> Memory:
    """Memory of one rank under a ZeRO stage (0 shares nothing out). offload: the optimizer lives in host memory.

    machine_ranks: above 1, stage 3 keeps a second copy of the weights, shared out among so many ranks (ZeRO++'s hpZ).
    micro_tokens: positions that a rank computes at a time; 0 for the state alone.
    """
    n = model.num_parameters
    second = -(-n * WEIGHT_BYTES // machine_ranks) if stage == 3 and machine_ranks > 1 else 0

    def shared(from_stage: int, size: int) -> int:
        return -(-n * size // ranks) if stage >= from_stage else n * size

    return Memory(
        weights=shared(3, WEIGHT_BYTES) + second,
        gradients=shared(2, GRADIENT_BYTES),
        optimizer=0 if offload else shared(1, OPTIMIZER_BYTES),
        activations=activation_bytes(model, micro_tokens, checkpointing, compiled),
        working=working_bytes(model, stage, reduce_once, reduce_bucket(model)) if micro_tokens else 0,
    )


def block_parameters(model: ModelConfig) -> int:
    """Weights of one block: 44,044,288 at 1.1B."""
    outside = 2 * model.vocab_size * model.hidden_size + model.hidden_size  # embedding, head, last norm
    return (model.num_parameters - outside) // model.num_hidden_layers


def reduce_bucket(model: ModelConfig) -> int:
    """Elements that one reduction of gradients takes on a GPU: a block and never fewer than 5e7, or the whole model."""
    return min(model.num_parameters, max(50_000_000, block_parameters(model)))


def bytes_per_step(
    model: ModelConfig, stage: int, ranks: int, accumulation: int, machine_ranks: int = 1, reduce_once: bool = False
) -> int:
    """Bytes that one rank sends in an optimizer step, in bf16, each collective in its ring form ((R - 1) / R of a tensor).

    Stage 3: every micro-step gathers the weights twice and scatters gradients once. Stage 2: gradients are scattered every
    micro-step, weights gathered once. Stage 1 (and 0): both once, at the end of the accumulation. With hpZ (machine_ranks
    above 1) the backward pass of stage 3 gathers inside the machine, which is not counted: a third less. reduce_once: under
    stages 2 and 3 gradients too are scattered once a step.
    """
    gathers = {3: (1 if machine_ranks > 1 else 2) * accumulation}.get(stage, 1)
    scatters = 1 if stage <= 1 or reduce_once else accumulation
    passes = gathers + scatters
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
    compiled: bool = True,
    reduce_once: bool = False,
    device: str = "H100",
    free_bytes: int | None = None,
    mfu: float = 0.4,
    gigabytes_per_s: float = 50.0,
) -> dict[str, Any]:
    """Everything that `tinyllama train --dry-run` says, JSON-ready.

    free_bytes: of the device, where it was measured; its data sheet's memory when None.

    machine_ranks: the ranks of a machine where the JSON asks for hpZ, else 1. mfu: the share of the device's peak that is
    assumed. gigabytes_per_s: what one rank can send. `stages` has each stage's memory, traffic and step time, computation
    and traffic not overlapped: the pessimist's order, which is what stages are compared by. `advice` names a stage that
    fits and is more than 5% faster, or on one rank stage 1 if it fits; None where there is none.
    """
    limits = hardware.named(device)
    capacity = limits.memory_bytes if free_bytes is None else free_bytes
    flops = {name: model.flops_per_token(sequence_length, name) for name in ("full", "all_parameters", "causal")}
    step_tokens = micro * accumulation * ranks * sequence_length
    compute_s = step_tokens * flops["full"] / (limits.flops_per_s * mfu * ranks)
    stages: dict[int, dict[str, Any]] = {}
    for number in (1, 2, 3):
        once = reduce_once and number > 1
        tokens_at_once = micro * sequence_length
        need = memory(
            model,
            number,
            ranks,
            tokens_at_once,
            checkpointing,
            offload,
            machine_ranks,
            compiled=compiled,
            reduce_once=once,
        )
        traffic = bytes_per_step(model, number, ranks, accumulation, machine_ranks, once)
        bus = bus_bytes_per_step(model, ranks, offload)
        stages[number] = {
            "memory_bytes": {**dataclasses.asdict(need), "total": need.total},
            "fits": need.total <= USABLE * capacity,
            "bytes_per_step": traffic,
            "bus_bytes_per_step": bus,
            "step_s": compute_s + traffic / (gigabytes_per_s * 1e9) + bus / (BUS_GIGABYTES_PER_S * 1e9),
        }
    chosen = stages[stage]["step_s"]
    best = min((s for s in stages if stages[s]["fits"]), key=lambda s: (stages[s]["step_s"], s), default=stage)
    faster = stages[best]["step_s"] < 0.95 * chosen or (ranks == 1 and best < stage)
    return {
        "parameters": model.num_parameters,
        "flops_per_token": flops,
        "total_flops": tokens * flops["full"],
        "tokens": tokens,
        "step_tokens": step_tokens,
        "ranks": ranks,
        "device": limits.name,
        "capacity_bytes": capacity,
        "offload": offload,
        "assumed_mfu": mfu,
        "assumed_gigabytes_per_s": gigabytes_per_s,
        "stage": stage,
        "stages": stages,
        "days": tokens / step_tokens * chosen / 86400,
        "device_hours": tokens / step_tokens * chosen / 3600 * ranks,
        "advice": best if faster else None,
    }


def advice(numbers: dict[str, Any]) -> str | None:
    """One line on the stage that `estimate` found to be faster than the chosen one; None where there is none."""
    if (best := numbers["advice"]) is None:
        return None
    now, other = numbers["stages"][numbers["stage"]], numbers["stages"][best]
    fits = f"ZeRO-{best} fits ({other['memory_bytes']['total'] / 1e9:.1f} of {numbers['capacity_bytes'] / 1e9:.0f} GB)"
    # Without the offload, which the numbers are for, the shipped stage may not fit.
    how = f'"stage": {best} in your DeepSpeed JSON, offload kept' if numbers["offload"] else f"--deepspeed zero{best}"
    if numbers["ranks"] == 1:
        return f"{fits} and on one GPU spares the work of sharing out what nobody else holds: {how}"
    return (
        f"{fits} and sends {other['bytes_per_step'] / 1e9:.1f} instead of {now['bytes_per_step'] / 1e9:.1f} GB a step, "
        f"up to {1 - other['step_s'] / now['step_s']:.0%} faster (assumed: {numbers['assumed_mfu']:.0%} MFU, "
        f"{numbers['assumed_gigabytes_per_s']:g} GB/s a rank, not overlapped): {how}"
    )
