"""Training the blocks' matrix products in float8, by torchao, with one scale for each tensor ("tensorwise").

Inputs and weights are rounded to E4M3 and gradients to E5M2 as they enter a product, whose sums are kept in higher
precision. Weights, gradients and everything between the products stay bf16, the masters fp32: parameters, checkpoints and
exports are those of a bf16 run. The head, the embedding and the norms are not touched. Passes without gradients
(validation, evaluation, a checkpoint's proof) multiply in bf16, which is what an export computes, and where a token's
result does not depend on its neighbours through a common scale.
"""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

from tinyllama.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from tinyllama.model.kernels import Choice
    from tinyllama.model.llama import Llama

CAPABILITY = (8, 9)  # Ada; Hopper is 9.0
MULTIPLE = 16  # of every dimension that a float8 product sums over or writes
FIX = "set training.precision to bf16"


def refusal(device: str, capability: tuple[int, int], sizes: dict[str, int]) -> str | None:
    """Why float8 products cannot be used, or None. sizes: by name, each of which must be a multiple of 16."""
    if device == "cuda" and capability < CAPABILITY:
        return f"needs compute capability {CAPABILITY[0]}.{CAPABILITY[1]}, this GPU has {capability[0]}.{capability[1]}"
    for name, size in sizes.items():
        if size % MULTIPLE:
            return f"needs multiples of {MULTIPLE}, {name} is {size}"
    return None


def refuse_without_bf16(bf16: bool) -> None:
    """ConfigError unless DeepSpeed trains a bf16 copy of the weights."""
    if not bf16:
        raise ConfigError("training.precision='fp8' needs bf16 weights", fix="set bf16.enabled in the DeepSpeed file")


def refuse_without_torchao() -> None:
    """MissingExtraError where it is not installed."""
    if importlib.util.find_spec("torchao") is None:
        raise MissingExtraError("torchao", "fp8")


def set_precision(precision: str, bf16: bool, model: Llama, device: torch.device, micro_batch_tokens: int) -> Choice:
    """Apply `training.precision`; the row of the kernel table. bf16: whether DeepSpeed trains a bf16 copy of the weights.

    Raises what `convert` raises, and ConfigError for float8 without bf16.
    """
    if precision == "fp8":
        refuse_without_bf16(bf16)
        return convert(model, device, micro_batch_tokens)
    from tinyllama.model.kernels import Choice

    return Choice(
        "matrix products", "bf16" if bf16 else "fp32", "as the recipe says" if bf16 else "bf16.enabled is false"
    )


def convert(model: Llama, device: torch.device, micro_batch_tokens: int) -> Choice:
    """Let the linear layers of the blocks multiply in float8 where gradients are wanted; the row of the kernel table.

    To be called on the bf16 or fp32 model before DeepSpeed wraps it; parameters stay what they are. On a CPU the
    products are emulated. Raises MissingExtraError without torchao, ConfigError where the GPU or a size does not fit.
    """
    refuse_without_torchao()
    import torch

    from tinyllama.model.kernels import Choice

    cuda = device.type == "cuda"
    capability = torch.cuda.get_device_capability(device) if cuda else (0, 0)
    layers = {name: module for name, module in model.named_modules() if _in_block(module, name)}
    sizes = {"micro_batch_sequences x sequence_length": micro_batch_tokens}
    for name, layer in layers.items():
        sizes |= {f"the input of {name}": layer.in_features, f"the output of {name}": layer.out_features}
    if reason := refusal(device.type, capability, sizes):
        raise ConfigError(f"training.precision='fp8' {reason}", fix=FIX)
    _convert(model, emulate=not cuda)
    why = "as the recipe says" if cuda else "as the recipe says; emulated on a CPU, slowly"
    return Choice("matrix products", "fp8 tensorwise (torchao)", why)


def _in_block(module: nn.Module, name: str) -> bool:
    """Whether a module is a linear layer of a block, by its name in the model."""
    from torch.nn import Linear

    return isinstance(module, Linear) and name.startswith("model.layers.")


def _convert(model: Llama, emulate: bool) -> None:
    import dataclasses

    # float8 training needs none of torchao's own kernels, which warn where they are not built for this torch.
    os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = dataclasses.replace(Float8LinearConfig.from_recipe_name("tensorwise"), emulate=emulate)
    convert_to_float8_training(model, config=config, module_filter_fn=_in_block)
    for name, module in model.named_modules():
        if _in_block(module, name):
            _only_with_gradients(module)


def _only_with_gradients(layer: nn.Module) -> None:
    import torch
    import torch.nn.functional as F

    in_float8 = layer.forward

    def forward(x: Tensor) -> Tensor:
        return in_float8(x) if torch.is_grad_enabled() else F.linear(x, layer.get_parameter("weight"))

    layer.forward = forward  # type: ignore[method-assign]
