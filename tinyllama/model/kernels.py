"""Which implementation computes what: chosen once, by what is installed and what the device can do, and told.

A recipe may name kernels (`training.kernels`); one that cannot be used is an error that says why, and nothing falls back
silently. What is not named is chosen by `decide`, with its reason; on a GPU one pass of the attention is watched, so that
the table says what really ran (`confirm`). Every kernel is tested against an fp32 reference, values and gradients
(tests/model/test_kernels.py; those that need a GPU run where there is one).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tinyllama.errors import ConfigError
from tinyllama.model import ops
from tinyllama.model.config import ModelConfig
from tinyllama.model.machine import (
    Check,
    Setting,
    all_of,
    anywhere,
    gpu_kernel,
    no_cudnn,
    no_flex,
    not_deterministic,
    registered,
    sixteen_bits,
    unmasked,
)
from tinyllama.model.machine import Machine as Machine  # part of this module's interface
from tinyllama.model.ran import what_ran as what_ran  # part of this module's interface

Documents = tuple[Tensor, ...]  # what an attention knows of packed documents: made by its `layout`


def _mask(documents: Tensor) -> Documents:
    return (ops.document_mask(documents),)


def _numbers(documents: Tensor) -> Documents:
    return (documents,)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
    return ops.sdpa(q, k, v, documents[0] if documents else None)


def _blocked(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
    return ops.blocked_attention(q, k, v, documents[0] if documents else None)


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The functions that a model calls. Shapes: `ops.py`.

    attention: causal, q, k, v and perhaps documents to (B, T, H * D). layout: document numbers (B, T) to the documents
    that this attention takes, once for all layers. norm: x, weight, eps. rotary: q, k, cos, sin. swiglu: gate_up.
    loss: hidden (N, C), weight (V, C), targets (N) to the summed loss.
    """

    attention: Callable[..., Tensor] = _sdpa
    norm: Callable[[Tensor, Tensor, float], Tensor] = ops.rms_norm
    rotary: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = ops.rotary
    swiglu: Callable[[Tensor], Tensor] = ops.swiglu
    loss: Callable[[Tensor, Tensor, Tensor], Tensor] = ops.chunked_loss
    layout: Callable[[Tensor], Documents] = _mask


PLAIN = Kernels()


@dataclasses.dataclass(frozen=True)
class Choice:
    """One row of the table: what computes `operation`, and why it was chosen. ran: what a watched pass really ran."""

    operation: str
    kernel: str
    why: str
    ran: str = ""


# -- What a name stands for: built when chosen, so that nothing is imported in vain -----------------------------------------


def _flash_attn_2(setting: Setting) -> Callable[..., Tensor]:
    flash = importlib.import_module("flash_attn").flash_attn_func

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_last = (x.transpose(1, 2) for x in (q, k, v))  # (B, T, H, D)
        return flash(*heads_last, causal=True, deterministic=setting.deterministic).flatten(2)

    return attention


def within(backend: str) -> Callable[..., Tensor]:
    """torch's attention by one backend; an error where that refuses."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    chosen = getattr(SDPBackend, backend)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(chosen):
            return ops.sdpa(q, k, v)

    return attention


def _flash_in_torch(version: str) -> Callable[[Setting], Callable[..., Tensor]]:
    """flash-attn 3 or 4 registered as torch's flash kernel: an operator, which no compiler breaks at."""

    def build(_: Setting) -> Callable[..., Tensor]:
        from torch.nn.attention import activate_flash_attention_impl

        activate_flash_attention_impl(version)
        return within("FLASH_ATTENTION")

    return build


def _flex(_: Setting) -> Callable[..., Tensor]:
    from tinyllama.model import flex

    return flex.attention


def _layout(attention: str) -> Callable[[Tensor], Documents]:
    if attention == "flex":
        from tinyllama.model import flex

        return flex.layout
    return _numbers if attention == "blocked" else _mask


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
    """missing: why it cannot be used in a setting, or None. build: the function. when: by itself, and why; or None.

    runs: what a watched pass of it must have run (`ran.py`), where that has a name.
    """

    missing: Check
    build: Callable[[Setting], Any]
    when: Check
    runs: str | None = None


def _always(why: str) -> Check:
    return lambda _: why


def _cudnn_is_fastest(setting: Setting) -> str | None:
    """Where torch itself prefers cuDNN (`check_prefer_cudnn_attention` in sdp_utils.cpp)."""
    machine = setting.machine
    if (
        machine.torch_version < (2, 11)
        or (machine.cudnn or 0) <= 91500
        or machine.capability not in ((9, 0), (10, 0), (10, 3))
    ):
        return None
    return f"cuDNN {machine.cudnn_version}, on this GPU up to twice as fast as flash-attn 2"


def _on_blackwell(setting: Setting) -> str | None:
    return "the fastest installed for this GPU" if setting.machine.capability[0] == 10 else None


def _compiled_on_cpu(setting: Setting) -> str | None:
    if setting.machine.device != "cpu" or not setting.compiled:
        return None
    return "causal halves and groups, fused by the compiler" + (", inside documents" if setting.documents else "")


def _eager(why: str) -> Check:
    return lambda setting: None if setting.compiled else why


def _torch_attention(setting: Setting) -> str:
    if setting.documents:
        return "a mask of documents"
    if setting.deterministic and setting.machine.device == "cuda":
        return "torch chooses its backend among those with a deterministic backward pass"
    return "torch chooses its backend"


def _chunked_why(setting: Setting) -> str:
    why = "logits in chunks, their gradient at once"
    return f"{why}; liger's waits for the GPU (.item())" if setting.compiled and _LIGER(setting) is None else why


_NEVER: Check = lambda _: None  # noqa: E731
_LIGER = gpu_kernel("liger_kernel", (8, 0))
_PLAIN_WHY: Check = lambda s: "fused by the compiler" if s.compiled else "plain torch"  # noqa: E731
_FASTEST = _always("the fastest installed for this GPU")
_LIMITS = (unmasked, sixteen_bits)  # of every attention that is not torch's or ours

# In the order in which they are considered; the first that can be used, and wants to be, is chosen.
TABLE: dict[str, dict[str, Kernel]] = {
    "attention": {
        "flash-attn-3": Kernel(
            all_of(gpu_kernel("flash_attn_interface", (9, 0), newest=9), registered, *_LIMITS, not_deterministic),
            _flash_in_torch("FA3"),
            _FASTEST,
            "flash-attn-3",
        ),
        "flash-attn-4": Kernel(
            all_of(gpu_kernel("flash_attn.cute", (9, 0), newest=10), registered, *_LIMITS, not_deterministic),
            _flash_in_torch("FA4"),
            _on_blackwell,
            "flash-attn-4",
        ),
        "cudnn": Kernel(
            all_of(no_cudnn, *_LIMITS, not_deterministic),
            lambda _: within("CUDNN_ATTENTION"),
            _cudnn_is_fastest,
            "cudnn",
        ),
        "flash-attn-2": Kernel(
            all_of(gpu_kernel("flash_attn.flash_attn_interface", (8, 0)), *_LIMITS),
            _flash_attn_2,
            _FASTEST,
            "flash-attn-2",
        ),
        "flex": Kernel(
            all_of(no_flex, gpu_kernel("triton", (8, 0))),
            _flex,
            _always("blocks of a common document alone, fused by the compiler"),
            "flex",
        ),
        "blocked": Kernel(anywhere, lambda _: _blocked, _compiled_on_cpu),
        "sdpa": Kernel(anywhere, lambda _: _sdpa, _torch_attention),
    },
    "norm": {
        "liger": Kernel(_LIGER, _liger_norm, _eager("fused, without a compiler")),
        "torch": Kernel(anywhere, lambda _: ops.rms_norm, _PLAIN_WHY),
    },
    "rotary": {
        "liger": Kernel(_LIGER, _liger_rotary, _eager("fused, without a compiler")),
        "torch": Kernel(anywhere, lambda _: ops.rotary, _PLAIN_WHY),
    },
    "swiglu": {
        "liger": Kernel(_LIGER, _liger_swiglu, _eager("fused, without a compiler")),
        "torch": Kernel(anywhere, lambda _: ops.swiglu, _PLAIN_WHY),
    },
    "loss": {
        "liger": Kernel(_LIGER, _liger_loss, _eager("logits in chunks, fused")),
        "chunked": Kernel(anywhere, _chunked, _chunked_why),
    },
}


def decide(wanted: Mapping[str, str | None], setting: Setting) -> list[Choice]:
    """The names of the kernels of a run, and why; a function of its arguments alone where the setting names a machine.

    wanted: the recipe's, by operation; None is open. Raises ConfigError for a kernel that this machine, or this recipe,
    cannot use.
    """
    choices = []
    for operation, kernels in TABLE.items():
        name = wanted.get(operation)
        if name is not None:
            if reason := kernels[name].missing(setting):
                raise ConfigError(
                    f"training.kernels.{operation}={name!r}: {reason}",
                    fix=_install(name) if reason.endswith("installed") else _usable(operation, setting),
                )
            why = "as the recipe says"
        else:
            name, why = next(
                (name, reason)
                for name, kernel in kernels.items()
                if kernel.missing(setting) is None and (reason := kernel.when(setting))
            )
        choices.append(Choice(operation, name, why))
    return choices


def choose(wanted: Mapping[str, str | None], setting: Setting) -> tuple[Kernels, list[Choice]]:
    """The kernels of a run, and the table that says why. As `decide`."""
    choices = decide(wanted, setting)
    functions = {choice.operation: TABLE[choice.operation][choice.kernel].build(setting) for choice in choices}
    attention = next(choice.kernel for choice in choices if choice.operation == "attention")
    return Kernels(**functions, layout=_layout(attention)), choices


def _install(name: str) -> str:
    if name == "flash-attn-3":
        return "build it from the folder hopper/ of FlashAttention's repository; no index has it"
    extra = {"flash-attn-2": "flash2", "flash-attn-4": "flash4"}.get(name, "gpu")
    return f"pip install 'tinyllama[{extra}]'" + (" --no-build-isolation" if extra == "flash2" else "")


def _usable(operation: str, setting: Setting) -> str:
    names = [name for name, kernel in TABLE[operation].items() if kernel.missing(setting) is None]
    return f"here: {', '.join(names)}, or null for the best of them"


def confirm(
    kernels: Kernels, choices: list[Choice], setting: Setting, config: ModelConfig, length: int
) -> tuple[list[Choice], list[str]]:
    """The table with what really ran, and what to warn of: one row of `length` positions through the attention is watched.

    Raises ConfigError where the kernel refuses the run's shape. Leaves every random generator as it is.
    """
    generator = torch.Generator(setting.device).manual_seed(0)
    dtype = torch.bfloat16 if setting.low_precision else torch.float32

    def heads_of(number: int) -> Tensor:
        x = torch.randn(1, length, number * config.head_dim, dtype=dtype, device=setting.device, generator=generator)
        return x.view(1, length, number, config.head_dim).transpose(1, 2).requires_grad_()

    arguments: list[Any] = [heads_of(config.num_attention_heads), *(heads_of(config.num_key_value_heads) for _ in "kv")]
    if setting.documents:
        numbers = torch.arange(length, device=setting.device).unsqueeze(0) * 3 // length
        arguments.append(kernels.layout(numbers))
    chosen = next(choice for choice in choices if choice.operation == "attention")
    try:
        ran = what_ran(kernels.attention, *arguments)
    except RuntimeError as error:
        raise ConfigError(
            f"training.kernels.attention={chosen.kernel!r} does not run here: {str(error).splitlines()[0]}",
            fix="name another: training.kernels.attention=sdpa",
        ) from error
    known = TABLE["attention"][chosen.kernel].runs
    told = dataclasses.replace(chosen, ran=", ".join(ran) or "no attention kernel that we know by name")
    doubts = []
    if known and ran != [known]:
        doubts.append(
            f"attention: {chosen.kernel} was chosen, and what ran is: {told.ran} "
            f"(torch {torch.__version__}, cuDNN {setting.machine.cudnn_version})"
        )
    return [told if choice is chosen else choice for choice in choices], doubts
