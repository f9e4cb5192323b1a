"""Which share of a step each kind of kernel takes, by the kernels' names."""

from __future__ import annotations

import re
from collections.abc import Sequence

# The first that matches counts. CPU operators have torch's names, GPU kernels those of their libraries.
KINDS = (
    ("attention", r"flash|fmha|sdpa|cudnn.*(attn|fprop|bprop)|attention|dot_do_o|convert_dq"),
    ("communication", r"nccl|allreduce|all_gather|reduce_scatter|gloo"),
    ("loss", r"cross_entropy|log_softmax|logsumexp|nll_loss|softmax|exp_sub|_loss"),
    ("GEMM", r"gemm|nvjet|cutlass|cublas|xmma|aten::(mm|addmm|bmm|linear|_scaled_mm)|mkldnn|onednn|matmul|splitk"),
    ("optimizer", r"adam|multi_tensor|foreach|norm_kernel|lpnorm"),
    ("copy", r"memcpy|memset|copy_|fill_|direct_copy|CatArray|aten::(cat|zeros|empty)"),
    ("elementwise", r"triton_|elementwise|vectorized|reduce_kernel|embedding|index|aten::|cpp_fused|graph_|liger"),
)
OTHER = "other"


def kind_of(name: str) -> str:
    """The kind of a kernel."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), OTHER)


def shares(kernels: Sequence[tuple[str, float, int]]) -> dict[str, float]:
    """Part of the time of each kind, largest first; they add up to 1. kernels: (name, milliseconds, calls)."""
    total = sum(ms for _, ms, _ in kernels)
    found: dict[str, float] = {}
    for name, ms, _ in kernels:
        found[kind_of(name)] = found.get(kind_of(name), 0.0) + ms / total
    return dict(sorted(found.items(), key=lambda item: -item[1]))
