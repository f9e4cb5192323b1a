"""Which attention really ran: read off the names of the kernels and operators that torch's profiler saw.

A backend may refuse its inputs, and a library on LD_LIBRARY_PATH may stand before the one that torch was built for; the
name of a choice shows neither. The names below are those of cuDNN 9, torch 2.11 to 2.13 and flash-attn 2.5 to 4.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

# Kernels of a GPU: the first pattern that is found in a name counts.
KERNELS = (
    (r"cudnn\w*(sdpa|mha)", "cudnn"),
    (r"flash_attn\W?cute|FlashAttention(Forward|Backward)", "flash-attn-4"),
    (r"FlashAttn(Fwd|Bwd)", "flash-attn-3"),
    (r"pytorch_flash::", "flash"),
    (r"\bflash::|\bflash_(fwd|bwd)_", "flash-attn-2"),
    (r"fmha_cutlass[FB]|PyTorchMemEffAttention", "efficient"),
    (r"triton_\w*flex_attention", "flex"),
)
# Operators, where no kernel says more: on a CPU, without the right to watch a GPU, and for what is made of products.
OPERATORS = (
    (r"_scaled_dot_product_cudnn_attention|_cudnn_attention_", "cudnn"),
    (r"_scaled_dot_product_flash_attention_for_cpu", "cpu flash"),
    (r"_scaled_dot_product_(fused_)?flash_attention|aten::_flash_attention_", "flash"),
    (r"_scaled_dot_product_efficient_attention|aten::_efficient_attention_", "efficient"),
    (r"_scaled_dot_product_attention_math", "math"),
    (r"\bflash_attn_3::", "flash-attn-3"),
    (r"\bflash_attn::", "flash-attn-2"),
)


def _kinds(names: Iterable[str], patterns: tuple[tuple[str, str], ...]) -> list[str]:
    found: list[str] = []
    for name in names:
        kind = next((kind for pattern, kind in patterns if re.search(pattern, name)), None)
        if kind is not None and kind not in found:
            found.append(kind)
    return found


def classify(names: Iterable[str]) -> list[str]:
    """Kinds of attention among profiled names, each once; empty where none is known."""
    names = list(names)
    return _kinds(names, KERNELS) or _kinds(names, OPERATORS)


def what_ran(function: Callable[..., Tensor], *arguments: object) -> list[str]:
    """Kinds of attention that function(*arguments) ran, forward and backward: one pass unseen, which compiles, one seen.

    Gradients of the tensors among the arguments that require them are left in `.grad`.
    """
    from torch.profiler import ProfilerActivity, profile

    def both() -> None:
        output = function(*arguments)
        if output.requires_grad:
            output.backward(torch.ones_like(output))
        if output.device.type == "cuda":
            torch.cuda.synchronize(output.device)

    both()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        both()
    return classify(event.key for event in profiler.key_averages())
