"""Quantized Llama directories in the compressed-tensors format: what they hold, read back as numbers.

`tensors` gives every weight as the quantized model uses it, decompressed by compressed-tensors itself. `round_inputs` makes
our Llama round the inputs of its quantized layers as vLLM's kernels do, token by token, so that `load_model` of such a
directory computes what the quantized model computes. Writing one is `tinyllama/quantize.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyllama.errors import CheckpointError, ConfigError
from tinyllama.model import fused
from tinyllama.model.hf import DTYPES, lazy_tensors
from tinyllama.model.stored import read_config

if TYPE_CHECKING:
    from tinyllama.model.llama import Llama

METHOD = "compressed-tensors"
INT8_MAX, FP8_MAX = 127.0, 448.0  # largest values of symmetric int8 and of float8 E4M3
FP8_MIN_SCALE = 1 / (FP8_MAX * 512)  # vLLM's smallest scale of a token


@dataclasses.dataclass(frozen=True)
class Quantization:
    """The one scheme of a directory: compressed-tensors' own objects, and how the weights lie in the files."""

    format: str
    scheme: Any  # compressed_tensors.quantization.QuantizationScheme

    @property
    def inputs(self) -> str | None:
        """What the inputs of quantized layers are rounded to: "int8", "fp8", or None for weights alone."""
        given = self.scheme.input_activations
        return None if given is None else {"int": "int8", "float": "fp8"}[str(getattr(given.type, "value", given.type))]

    def describe(self) -> str:
        """Such as "8-bit int weights by channel, int8 inputs by token"."""
        weights = self.scheme.weights
        kind, unit = (str(getattr(v, "value", v)) for v in (weights.type, weights.strategy))
        by = f"groups of {weights.group_size}" if unit == "group" else unit
        inputs = f", {self.inputs} inputs by token" if self.inputs else ", inputs not rounded"
        return f"{weights.num_bits}-bit {kind} weights by {by}{inputs}"

    def decompress(self, parts: dict[str, Tensor]) -> Tensor:
        """The fp32 weight of one layer from its stored parts (`weight` or `weight_packed`, `weight_scale`, ...)."""
        from compressed_tensors.compressors import BaseCompressor

        compressor = BaseCompressor.get_value_from_registry(self.format)
        whole = {k: v.float() if k == "weight_scale" else v for k, v in parts.items()}
        return compressor.decompress(whole, self.scheme)["weight"]


def config_of(directory: Path) -> dict[str, Any] | None:
    """The quantization_config of a directory's config.json; None if it is not quantized. Imports nothing heavy."""
    return read_config(directory).get("quantization_config")


def of(directory: Path) -> Quantization | None:
    """How a directory is quantized; None if it is not. ConfigError for what cannot be read here."""
    config = config_of(directory)
    if not config:
        return None
    method = config.get("quant_method")
    if method != METHOD:
        raise ConfigError(
            f"{directory} is quantized by {method!r}", fix=f"only {METHOD} can be read, use --backend vllm"
        )
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    try:
        parsed = QuantizationConfig.model_validate(config)
    except ValueError as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"{directory}: quantization_config cannot be read ({reason})", fix="use --backend vllm"
        ) from None
    schemes = list(parsed.config_groups.values())
    if len(schemes) != 1 or parsed.kv_cache_scheme is not None:
        more = "a quantized cache" if parsed.kv_cache_scheme else f"{len(schemes)} quantization groups"
        raise ConfigError(f"{directory} has {more}", fix="only one group can be read, use --backend vllm")
    inputs = schemes[0].input_activations
    if inputs is not None and not (inputs.dynamic is True and inputs.strategy == "token" and inputs.num_bits == 8):
        raise ConfigError(
            f"{directory} has inputs of static scales", fix="only dynamic scales can be read, use --backend vllm"
        )
    stored_as = str(getattr(schemes[0].format or parsed.format, "value", schemes[0].format or parsed.format))
    if stored_as not in BaseCompressor.registered_names():
        raise ConfigError(f"{directory}: format {stored_as!r} cannot be read", fix="use --backend vllm")
    return Quantization(stored_as, schemes[0])


def layers(directory: Path) -> set[str]:
    """Names of the modules whose weight is quantized."""
    return {name.removesuffix(".weight_scale") for name in lazy_tensors(directory) if name.endswith(".weight_scale")}


def tensors(directory: Path, quantization: Quantization) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a plain Llama, one at a time: quantized ones as fp32, the others as they are stored."""
    from compressed_tensors.compressors import BaseCompressor

    wanted = BaseCompressor.get_value_from_registry(quantization.format).compression_param_names(quantization.scheme)
    stored, quantized = lazy_tensors(directory), layers(directory)
    for name, read in stored.items():
        layer, _, part = name.rpartition(".")
        if layer not in quantized:
            tensor = read()
            if tensor.dtype not in DTYPES.values():
                raise CheckpointError(f"{directory}: {layer}.weight_scale is missing", fix="quantize the model again")
            yield name, tensor
        elif part == "weight_scale":
            missing = [p for p in wanted if f"{layer}.{p}" not in stored]
            if missing:
                raise CheckpointError(f"{directory}: {layer}.{missing[0]} is missing", fix="quantize the model again")
            yield f"{layer}.weight", quantization.decompress({p: stored[f"{layer}.{p}"]() for p in wanted})


def round_int8(x: Tensor) -> Tensor:
    """The nearest of 255 values, -127 to 127 times absmax / 127 of each last dimension; as vLLM's dynamic int8."""
    values = x.float()
    scale = values.abs().amax(-1, keepdim=True) / INT8_MAX
    scale = torch.where(scale == 0, 1.0, scale)
    return ((values / scale).round().clamp(-INT8_MAX, INT8_MAX) * scale).to(x.dtype)


def round_fp8(x: Tensor) -> Tensor:
    """The nearest float8 (E4M3) value times absmax / 448 of each last dimension; as vLLM's dynamic fp8."""
    values = x.float()
    scale = (values.abs().amax(-1, keepdim=True) / FP8_MAX).clamp(min=FP8_MIN_SCALE)
    return ((values / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float() * scale).to(x.dtype)


def round_inputs(model: Llama, kind: str | None, names: set[str]) -> None:
    """Round the input of these modules, as Hugging Face names them. kind: "int8", "fp8", or None for inputs as they are.

    Where only some of a fused layer's parts are quantized, their rows alone are computed from rounded inputs.
    """
    if kind is None:
        return
    rounding: Callable[[Tensor], Tensor] = {"int8": round_int8, "fp8": round_fp8}[kind]

    def before(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (rounding(arguments[0]), *arguments[1:])

    def after(rows: list[slice], module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        rounded, weight = rounding(arguments[0]), module.get_parameter("weight")
        for part in rows:
            output[..., part] = F.linear(rounded, weight[part])

    for name, module in model.named_modules():
        parts = fused.parts(f"{name}.weight", model.config)
        chosen = [slice(part.first, part.last) for part in parts if part.name.removesuffix(".weight") in names]
        if name in names or (chosen and len(chosen) == len(parts)):
            module.register_forward_pre_hook(before)
        elif chosen:
            module.register_forward_hook(functools.partial(after, chosen))
