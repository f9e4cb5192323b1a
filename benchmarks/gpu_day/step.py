"""Stage 2 and parts of stage 6: the optimizer step of the 1.1B model, in as few processes as is safe.

Random weights are drawn on the device. Each row: one step to warm up and compile, then three that count.
"""

from __future__ import annotations

import os
import statistics
import time
from typing import Any

import torch
from device_under_test import Processor, find_device
from step_rows import Plain, Row, WithDeepSpeed, be_one_rank, on_device, random_batches

from gpu_day.rows import NeedsGpuError
from gpu_day.sizes import Around, around
from train import profiling

REPEATS = 3


class Steps:
    """One model and its optimizer, and the rows that are measured with it."""

    def __init__(self, here: Around, device: Processor, row: Row, precision: str = "bf16") -> None:
        from tinyllama.model.fp8 import set_precision
        from tinyllama.model.kernels import Setting, choose

        self.here, self.device, self.row, sizes = here, device, row, here.sizes
        accumulation = sizes.step_tokens // (sizes.micro * sizes.sequence_length)
        self.model = on_device(sizes.model, device.torch_device)
        kernels, choices = choose({}, Setting(device.torch_device, row.compiled is not None))
        self.model.use(kernels)
        self.kernels = {choice.operation: choice.kernel for choice in choices}
        tokens = sizes.micro * sizes.sequence_length
        choice = set_precision(precision, True, self.model, device.torch_device, tokens)
        self.kernels[choice.operation] = choice.kernel
        self.made: Any
        if row.stage is None:
            self.made = Plain(self.model, row.compiled, device.torch_device)
        else:
            be_one_rank(device.kind)
            free = device.memory_bytes()[0] if device.kind == "cuda" else None
            shape = (accumulation, sizes.micro, sizes.sequence_length, sizes.model)
            self.made = WithDeepSpeed(self.model, row, *shape, free_bytes=free)

    def go_eager(self) -> None:
        """From now on without the compiler, with the kernels that are chosen then."""
        from tinyllama.model.kernels import Setting, choose

        for layer in self.model.model.layers:
            layer.compiled = None
        kernels, choices = choose({}, Setting(self.device.torch_device))
        self.model.use(kernels)
        self.kernels = {choice.operation: choice.kernel for choice in choices}

    def batches(self, micro: int) -> list[tuple[Any, Any]]:
        sizes = self.here.sizes
        accumulation = sizes.step_tokens // (micro * sizes.sequence_length)
        return random_batches(
            sizes.model.vocab_size, accumulation, micro, sizes.sequence_length, self.device.torch_device
        )

    def measure(self, micro: int) -> tuple[str, dict[str, Any]]:
        """Seconds of the first step and of those that count, tokens/s, FLOP/s and peak memory."""
        sizes, device = self.here.sizes, self.device
        batches = self.batches(micro)
        if self.row.stage is not None:
            self.made.divide(micro, len(batches))
        device.empty_cache()
        device.reset_peak()
        began = time.perf_counter()
        self.made.step(batches, 1 / sizes.step_tokens)
        device.synchronize()
        first_s = time.perf_counter() - began
        times = device.times_ms(lambda: self.made.step(batches, 1 / sizes.step_tokens), REPEATS, warmup=0)
        rate = sizes.step_tokens / (statistics.median(times) / 1000)
        flops = sizes.model.flops_per_token(sizes.sequence_length)
        values = {
            "tokens_per_s": rate,
            "flops_per_s": rate * flops,
            "flops_per_token": flops,
            "step_ms": times,
            "first_step_s": first_s,
            "peak_bytes": device.peak_bytes(),
            "micro": micro,
            "step_tokens": sizes.step_tokens,
            "kernels": self.kernels,
            "reduce_once": getattr(self.made, "reduce_once", None),
        }
        memory = values["peak_bytes"] / 2**30
        return f"{rate:,.0f} tokens/s, {rate * flops / 1e12:.1f} TFLOP/s, {memory:.1f} GiB", values

    def profile(self) -> tuple[str, dict[str, Any]]:
        """The kernels of one micro-step, forward and backward, and the share of each kind."""
        ids, targets = self.batches(self.here.sizes.micro)[0]

        def micro_step() -> None:
            self.model(ids, targets).backward()

        micro_step()
        found = profiling.shares(self.device.profiled(micro_step))
        for parameter in self.model.parameters():
            parameter.grad = None
        total = sum(row.total_us for row in found) / 1000
        kernels = [[row.name, row.category, row.total_us / 1000, row.calls] for row in found[:40]]
        values = {"shares": profiling.by_category(found), "device_ms": total, "tokens": ids.numel(), "kernels": kernels}
        return f"{total:.1f} ms: {profiling.summary(found)}", values


def plain(here: Around, device: Processor) -> None:
    """Without DeepSpeed: what the model itself can give, and where its time goes."""
    steps: list[Steps] = []

    def first() -> tuple[str, dict[str, Any]]:
        steps.append(Steps(here, device, Row("ours", None, "block")))
        return steps[0].measure(here.sizes.micro)

    here.rows.measure(f"by blocks, no DeepSpeed, micro {here.sizes.micro}", first)
    if steps:
        here.rows.measure("profile of a micro-step, no DeepSpeed", steps[0].profile)


def zero1(here: Around, device: Processor) -> None:
    """ZeRO-1 with two micro-batches."""
    micro = here.sizes.micro
    steps: list[Steps] = []

    def first() -> tuple[str, dict[str, Any]]:
        steps.append(Steps(here, device, Row("ours", 1, "block")))
        return steps[0].measure(micro)

    here.rows.measure(f"by blocks, ZeRO-1, micro {micro}", first)
    if steps:
        here.rows.measure(f"by blocks, ZeRO-1, micro {2 * micro}", lambda: steps[0].measure(2 * micro))


def zero3(here: Around, device: Processor) -> None:
    """ZeRO-3 compiled, then the same engine without the compiler, where liger's kernels are chosen."""
    micro = here.sizes.micro
    steps: list[Steps] = []

    def first() -> tuple[str, dict[str, Any]]:
        steps.append(Steps(here, device, Row("ours", 3, "block")))
        return steps[0].measure(micro)

    def eager() -> tuple[str, dict[str, Any]]:
        steps[0].go_eager()
        return steps[0].measure(micro)

    here.rows.measure(f"by blocks, ZeRO-3, micro {micro}", first)
    if steps:
        here.rows.measure(f"eager, ZeRO-3, micro {micro}", eager)


def deepcompile(here: Around, device: Processor) -> None:
    """DeepSpeed's own compiler."""

    def only() -> tuple[str, dict[str, Any]]:
        if device.needs_gpu:
            raise NeedsGpuError(device.needs_gpu)
        return Steps(here, device, Row("ours", 3, "deepcompile")).measure(here.sizes.micro)

    here.rows.measure(f"DeepCompile, ZeRO-3, micro {here.sizes.micro}", only)


def fp8(here: Around, device: Processor) -> None:
    """Blocks in FP8; a CPU emulates it."""

    def only() -> tuple[str, dict[str, Any]]:
        return Steps(here, device, Row("ours", 1, "block"), "fp8").measure(here.sizes.micro)

    here.rows.measure(f"FP8 by blocks, ZeRO-1, micro {here.sizes.micro}", only)


PARTS = {"plain": plain, "zero1": zero1, "zero3": zero3, "deepcompile": deepcompile, "fp8": fp8}


def main() -> None:
    here = around()
    torch.manual_seed(1)
    PARTS[here.part](here, find_device())
    os._exit(0)  # DeepSpeed's threads can abort a process that ends in order


if __name__ == "__main__":
    main()
