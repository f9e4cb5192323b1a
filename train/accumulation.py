"""From the gradients of a step's micro-batches to one, summed in fp32, and the optimizer's step.

Two ways. DeepSpeed's own reduces each micro-batch's gradients over the ranks (stage 1: sums them on the rank) and adds them
to fp32 buffers. `reduce_once` keeps the gradients of all parameters on every rank and reduces their sum at the end of the
step: stage 3 then sends (4 A + 2) N bytes instead of 6 N A, and does not wait for the device in every backward pass; on one
rank, where nothing is sent, it moves a third of the bytes through the GPU's memory.

DeepSpeed's `coalesce_grad_reduction` alone would sum in the parameters' dtype: in bf16, 1 + 2^-9 is 1, and what many
micro-batches add is lost (tests/train/test_reduction.py shows it). Here the first micro-batch's gradients become fp32,
and the later ones, whose dtype autograd leaves alone (`grad_dtype`), are added to those in place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class Accumulation:
    """The gradients of an engine, step by step: `with step(): ... backward, added() for each micro-batch`."""

    def __init__(self, engine: DeepSpeedEngine, reduce_once: bool) -> None:
        self._engine, self._once = engine, reduce_once
        self._parameters = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
        # Stage 1 in bf16 leaves each micro-batch's gradients, already summed in fp32, to be filled with zeros and added to.
        optimizer = engine.optimizer
        self._clears = hasattr(optimizer, "clear_lp_grads") and not optimizer.immediate_grad_update
        self._converted = False
        if reduce_once:
            engine.set_gradient_accumulation_boundary(True)  # each call of step() is one
            for parameter in self._parameters:
                parameter.grad_dtype = None  # any: what arrives is added to what is there, in the dtype of that

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around the micro-batches of one optimizer step, which is taken at its end. Collective."""
        if not self._once:
            yield
            return
        self._converted = False
        with self._engine.coalesce_grad_reduction():
            try:
                yield
            except BaseException:
                # DeepSpeed reduces on the way out, and the other ranks would not take part.
                for parameter in self._parameters:
                    parameter.grad = None
                raise
        self._engine.step()

    def added(self) -> None:
        """After each micro-batch's `engine.backward`."""
        if not self._once:
            self._engine.step()  # acts on the last micro-batch only
            if self._clears:
                self._engine.optimizer.clear_lp_grads(set_to_none=True)
        elif not self._converted:
            for parameter in self._parameters:
                if parameter.grad is not None:
                    # Not `parameter.grad = `: stage 3 has taken the parameter's own storage away, and shapes would differ.
                    parameter.grad.data = parameter.grad.float()
            self._converted = True
