"""Which of our parameters hold several of Hugging Face's, and the one place where they are split and joined.

    ours                           shape               Hugging Face's, stacked along the rows
    self_attn.qkv_proj.weight      (C + 2 * K * D, C)  q_proj (C, C), k_proj (K * D, C), v_proj (K * D, C)
    mlp.gate_up_proj.weight        (2 * F, C)          gate_proj (F, C), up_proj (F, C)

One product of a wide matrix is faster than several of narrow ones. A part is a range of rows, and a weight is row-major:
flattened, the fused weight is its flattened parts one after the other. So a part is a view, and a slice of the flattened
fused weight (what a ZeRO rank holds) is at most one slice of each part. State dicts, checkpoints and exports know only
Hugging Face's names; every other parameter has the same name and shape on both sides.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from tinyllama.model.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tinyllama.model.llama import Llama

PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
WHOLE = {part: module for module, parts in PARTS.items() for part in parts}


class Part(NamedTuple):
    """A Hugging Face parameter inside of a fused one: its name and its rows [first, last) there."""

    name: str
    first: int
    last: int


def row_counts(module: str, config: ModelConfig) -> tuple[int, ...]:
    """Rows of each part of `qkv_proj` or `gate_up_proj`, in their order."""
    if module == "qkv_proj":
        return config.hidden_size, config.kv_dim, config.kv_dim
    return config.intermediate_size, config.intermediate_size


def _replaced(name: str, module: str) -> str:
    """`name` with another module before its `.weight`."""
    *prefix, _, leaf = name.split(".")
    return ".".join((*prefix, module, leaf))


def parts(name: str, config: ModelConfig) -> list[Part]:
    """The parts of a fused parameter, in the order of their rows; empty for every other parameter."""
    module = name.split(".")[-2]
    found: list[Part] = []
    first = 0
    for part in PARTS.get(module, ()):
        last = first + row_counts(module, config)[len(found)]
        found.append(Part(_replaced(name, part), first, last))
        first = last
    return found


def split(name: str, tensor: Tensor, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """A parameter, or a gradient of one, by Hugging Face's names: views of `tensor` where it is fused."""
    found = parts(name, config)
    if found and tensor.shape[:1] != (found[-1].last,):
        raise RuntimeError(f"{name} is partitioned: split it inside deepspeed.zero.GatheredParameters")
    if not found:
        yield name, tensor
    for part in found:
        yield part.name, tensor[part.first : part.last]


def split_slice(name: str, start: int, stop: int, config: ModelConfig) -> Iterator[tuple[str, int, int]]:
    """Elements [start, stop) of a flattened parameter as slices of Hugging Face's, one after the other.

    Yields the name and the slice's elements [first, last) of that flattened parameter; empty slices are left out.
    """
    found = parts(name, config)
    if not found:
        yield name, start, stop
    for part in found:
        begin, end = part.first * config.hidden_size, part.last * config.hidden_size
        first, last = max(start, begin), min(stop, end)
        if first < last:
            yield part.name, first - begin, last - begin


def join(tensors: Iterable[tuple[str, Tensor]], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face's parameters, in any order, as ours; a fused one comes when the last of its parts has."""
    import torch

    waiting: dict[str, Tensor] = {}
    for name, tensor in tensors:
        module = WHOLE.get(name.split(".")[-2]) if "." in name else None
        if module is None:
            yield name, tensor
            continue
        waiting[name] = tensor
        whole = _replaced(name, module)
        wanted = [part.name for part in parts(whole, config)]
        if all(part in waiting for part in wanted):
            yield whole, torch.cat([waiting.pop(part) for part in wanted])


def hf_parameters(model: Llama) -> Iterator[tuple[str, Tensor]]:
    """Every parameter by Hugging Face's name and in its order: detached, sharing the model's memory."""
    for name, parameter in model.named_parameters():
        yield from split(name, parameter.detach(), model.config)


def use_hf_state(module: nn.Module, config: ModelConfig) -> None:
    """Let the state dict of a module that has a fused layer hold, and accept, Hugging Face's names alone."""
    # Functions of this module, not closures: a model can be pickled.
    module.register_state_dict_post_hook(functools.partial(_give, config))
    module.register_load_state_dict_pre_hook(functools.partial(_take, config))


def _give(config: ModelConfig, _: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
    for key in [key for key in state if key.startswith(prefix)]:  # all again, to keep the order
        state.update(split(key, state.pop(key), config))


def _take(
    config: ModelConfig,
    owner: nn.Module,
    state: dict[str, Any],
    prefix: str,
    _: Any,
    strict: bool,
    missing: list[str],
    __: Any,
    errors: list[str],
) -> None:
    import torch

    for layer in PARTS.keys() & dict(owner.named_children()).keys():
        weight = owner.get_parameter(f"{layer}.weight").detach()
        given = []
        for part, current in split(f"{prefix}{layer}.weight", weight, config):
            tensor = state.pop(part, None)
            if tensor is None and strict:
                missing.append(part)
            if tensor is not None and tensor.shape != current.shape:
                errors.append(f"size mismatch for {part}: {tuple(tensor.shape)}, expected {tuple(current.shape)}")
            given.append(current if tensor is None or tensor.shape != current.shape else tensor)
        state[f"{prefix}{layer}.weight"] = torch.cat(given)
