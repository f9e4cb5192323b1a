"""Which implementation computes what: chosen once, by what is installed and what the device can do, and told.

A recipe may name kernels (`training.kernels`); one that cannot be used is an error that says why, and nothing falls back
silently. What is not named is chosen by `choose`, with its reason. Every kernel is tested against an fp32 reference,
values and gradients (tests/model/test_kernels.py; those that need a GPU run where there is one).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tinyllama.errors import ConfigError
from tinyllama.model import ops


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The functions that a model calls. Shapes: `ops.py`.

    attention: causal, q, k, v to (B, T, H * D). norm: x, weight, eps. rotary: q, k, cos, sin. swiglu: gate_up.
    loss: hidden (N, C), weight (V, C), targets (N) to the summed loss.
    """

    attention: Callable[[Tensor, Tensor, Tensor], Tensor] = ops.sdpa
    norm: Callable[[Tensor, Tensor, float], Tensor] = ops.rms_norm
    rotary: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = ops.rotary
    swiglu: Callable[[Tensor], Tensor] = ops.swiglu
    loss: Callable[[Tensor, Tensor, Tensor], Tensor] = ops.chunked_loss


PLAIN = Kernels()


@dataclasses.dataclass(frozen=True)
class Choice:
    """One row of the table: what computes `operation`, and why it was chosen."""

    operation: str
    kernel: str
    why: str


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a choice depends on. documents: attention stays inside documents, so that it needs a mask."""

    device: torch.device
    compiled: bool = False
    documents: bool = False

    @property
    def capability(self) -> tuple[int, int]:
        """Of the GPU, as (9, 0) for an H100; (0, 0) without one."""
        return torch.cuda.get_device_capability(self.device) if self.device.type == "cuda" else (0, 0)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that would hold it
        return False


def _gpu_kernel(module: str, least: tuple[int, int], newest: int | None = None) -> Callable[[Setting], str | None]:
    """The check of a kernel that needs an installed module and a GPU of some capability; None if it can be used."""

    def missing(setting: Setting) -> str | None:
        if setting.device.type != "cuda":
            return "it needs a GPU"
        major, minor = setting.capability
        if (major, minor) < least or (newest is not None and major > newest):
            return f"this GPU is of compute capability {major}.{minor}, and it needs {least[0]}.{least[1]}"
        if not _installed(module):
            return f"{module.split('.')[0]} is not installed"
        return None

    return missing


def _unmasked(check: Callable[[Setting], str | None]) -> Callable[[Setting], str | None]:
    """As `check`, of an attention that takes no mask."""

    def missing(setting: Setting) -> str | None:
        return "data.document_masking needs a mask" if setting.documents else check(setting)

    return missing


def _anywhere(_: Setting) -> str | None:
    return None


# -- What a name stands for: built when chosen, so that nothing is imported in vain -----------------------------------------


def _flash(module: str) -> Callable[[Setting], Any]:
    def build(_: Setting) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        flash = importlib.import_module(module).flash_attn_func

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            found = flash(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=True)
            return (found[0] if isinstance(found, tuple) else found).flatten(2)  # (B, T, H, D) to (B, T, H * D)

        return attention

    return build


def _cudnn(_: Setting) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return ops.sdpa(q, k, v)

    return attention


def _liger_norm(_: Setting) -> Callable[[Tensor, Tensor, float], Tensor]:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    # Not in place: the gradient that it would overwrite may also belong to the residual.
    return lambda x, weight, eps: LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)


def _liger_rotary(_: Setting) -> Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    from liger_kernel.ops.rope import LigerRopeFunction

    return lambda q, k, cos, sin: LigerRopeFunction.apply(q, k, cos.squeeze(1), sin.squeeze(1))


def _liger_swiglu(_: Setting) -> Callable[[Tensor], Tensor]:
    from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction

    def swiglu(gate_up: Tensor) -> Tensor:
        # Rows, since its gradient has two dimensions (0.8.5). In place: nothing else reads what the projection wrote.
        return LigerFusedGateUpSiLUMulFunction.apply(gate_up.flatten(0, -2), True).unflatten(0, gate_up.shape[:-1])

    return swiglu


def _liger_loss(_: Setting) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    # Without accum_dtype the head's gradient would be summed over the chunks in bf16.
    return functools.partial(liger_fused_linear_cross_entropy, reduction="sum", accum_dtype=torch.float32)


def _chunked(setting: Setting) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if not setting.compiled:
        return ops.chunked_loss
    return functools.partial(ops.chunked_loss, of_logits=torch.compile(ops.loss_and_gradient, dynamic=False))


@dataclasses.dataclass(frozen=True)
class Kernel:
    """missing: why it cannot be used in a setting, or None. build: the function. when: by itself, and why; or None."""

    missing: Callable[[Setting], str | None]
    build: Callable[[Setting], Any]
    when: Callable[[Setting], str | None]


def _always(why: str) -> Callable[[Setting], str | None]:
    return lambda _: why


def _compiled_on_cpu(setting: Setting) -> str | None:
    return (
        "causal halves and groups, fused by the compiler" if setting.device.type == "cpu" and setting.compiled else None
    )


def _eager(why: str) -> Callable[[Setting], str | None]:
    return lambda setting: None if setting.compiled else why


_NEVER: Callable[[Setting], str | None] = lambda _: None  # noqa: E731
_LIGER = _gpu_kernel("liger_kernel", (8, 0))
_PLAIN_WHY: Callable[[Setting], str | None] = lambda s: "fused by the compiler" if s.compiled else "plain torch"  # noqa: E731

# In the order in which they are considered; the first that can be used, and wants to be, is chosen.
TABLE: dict[str, dict[str, Kernel]] = {
    "attention": {
        "flash-attn-3": Kernel(
            _unmasked(_gpu_kernel("flash_attn_interface", (9, 0), newest=9)),
            _flash("flash_attn_interface"),
            _always("the fastest installed for this GPU"),
        ),
        "flash-attn-4": Kernel(
            _unmasked(_gpu_kernel("flash_attn.cute", (9, 0))),
            _flash("flash_attn.cute"),
            _always("the fastest installed for this GPU"),
        ),
        "flash-attn-2": Kernel(
            _unmasked(_gpu_kernel("flash_attn.flash_attn_interface", (8, 0))),
            _flash("flash_attn"),
            _always("the fastest installed for this GPU"),
        ),
        "cudnn": Kernel(_unmasked(_gpu_kernel("torch", (8, 0))), _cudnn, _NEVER),
        "blocked": Kernel(_unmasked(_anywhere), lambda _: ops.blocked_attention, _compiled_on_cpu),
        "sdpa": Kernel(
            _anywhere,
            lambda _: ops.sdpa,
            lambda s: "masks of documents" if s.documents else "torch chooses its backend",
        ),
    },
    "norm": {
        "liger": Kernel(_LIGER, _liger_norm, _eager("fused, without a compiler")),
        "torch": Kernel(_anywhere, lambda _: ops.rms_norm, _PLAIN_WHY),
    },
    "rotary": {
        "liger": Kernel(_LIGER, _liger_rotary, _eager("fused, without a compiler")),
        "torch": Kernel(_anywhere, lambda _: ops.rotary, _PLAIN_WHY),
    },
    "swiglu": {
        "liger": Kernel(_LIGER, _liger_swiglu, _eager("fused, without a compiler")),
        "torch": Kernel(_anywhere, lambda _: ops.swiglu, _PLAIN_WHY),
    },
    "loss": {
        "liger": Kernel(_LIGER, _liger_loss, _eager("logits in chunks, fused")),
        "chunked": Kernel(_anywhere, _chunked, _always("logits in chunks, their gradient at once")),
    },
}


def choose(wanted: Mapping[str, str | None], setting: Setting) -> tuple[Kernels, list[Choice]]:
    """The kernels of a run, and the table that says why. wanted: the recipe's, by operation; None is open.

    Raises ConfigError for a kernel that this machine, or this recipe, cannot use.
    """
    functions, choices = {}, []
    for operation, kernels in TABLE.items():
        name = wanted.get(operation)
        if name is not None:
            if reason := kernels[name].missing(setting):
                raise ConfigError(
                    f"training.kernels.{operation}={name!r}: {reason}",
                    fix="pip install 'tinyllama[gpu]'" if reason.endswith("installed") else _usable(operation, setting),
                )
            why = "as the recipe says"
        else:
            name, why = next(
                (name, reason)
                for name, kernel in kernels.items()
                if kernel.missing(setting) is None and (reason := kernel.when(setting))
            )
        functions[operation] = kernels[name].build(setting)
        choices.append(Choice(operation, name, why))
    return Kernels(**functions), choices


def _usable(operation: str, setting: Setting) -> str:
    names = [name for name, kernel in TABLE[operation].items() if kernel.missing(setting) is None]
    return f"here: {', '.join(names)}, or null for the best of them"
