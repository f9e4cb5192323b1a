"""Weights to and from Hugging Face directories (safetensors), one tensor at a time.

Loading is a strict check of names and shapes and a copy; weights that our model holds fused are filled as views
(`fused.py`). `load_model` gives a `Llama` from an export or any Hugging Face Llama directory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinyllama.errors import CheckpointError
from tinyllama.model import stored
from tinyllama.model.config import ModelConfig, llama_tensors
from tinyllama.model.fused import hf_parameters
from tinyllama.model.llama import Llama

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face's name and shape of every parameter of a model of this configuration, without allocating any."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in hf_parameters(Llama(config))}


def check_names(found: dict[str, tuple[int, ...]], config: ModelConfig, where: str) -> None:
    """Refuse a set of tensors that is not exactly this model's: missing, unexpected or misshapen."""
    stored.check_shapes(found, shapes(config).items(), where)


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a Hugging Face directory, each with a sound header. CheckpointError as `stored.tensors`."""
    return list(dict.fromkeys(tensor.file for tensor in stored.tensors(directory).values()))


def lazy_tensors(directory: Path) -> dict[str, Callable[[], Tensor]]:
    """For every tensor of a Hugging Face directory what reads it, in the order of the files."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, Callable[[], Tensor]] = {}
    handles: dict[Path, Any] = {}
    for name, tensor in stored.tensors(directory).items():
        if tensor.file not in handles:
            try:
                handles[tensor.file] = safe_open(tensor.file, framework="pt")
            except SafetensorError as error:
                raise CheckpointError(f"{tensor.file} is corrupt ({error})", fix="export the model again") from None
        found[name] = functools.partial(handles[tensor.file].get_tensor, name)
    return found


def read_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a Hugging Face directory, one at a time."""
    for name, read in lazy_tensors(directory).items():
        yield name, read()


def fill(model: Llama, tensors: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Copy tensors into the model's parameters; strict on names and shapes."""
    parameters = dict(hf_parameters(model))
    seen: dict[str, tuple[int, ...]] = {}
    with torch.no_grad():
        for name, tensor in tensors:
            seen[name] = tuple(tensor.shape)
            if name in parameters and parameters[name].shape == tensor.shape:
                parameters[name].copy_(tensor)
    check_names(seen, model.config, where)


def load_model(directory: str | Path, dtype: str = "float32", device: str = "cpu") -> Llama:
    """A `Llama` in eval mode from a Hugging Face Llama directory.

    dtype: one of DTYPES. A quantized directory gives a model that computes in `dtype` with its dequantized weights and
    rounds what the quantized one rounds. Raises CheckpointError on missing, unexpected or misshapen tensors.
    """
    from tinyllama.model import quantized

    directory = Path(directory)
    config = ModelConfig.from_hf(directory)
    quantization = quantized.of(directory)
    if quantization is None:
        stored.check_weights(directory, llama_tensors(config.to_hf()))
    with torch.device("meta"):
        model = Llama(config)
    model = model.to_empty(device=device).to(DTYPES[dtype])
    if quantization is None:
        fill(model, read_tensors(directory), str(directory))
    else:
        fill(model, quantized.tensors(directory, quantization), str(directory))
        quantized.round_inputs(model, quantization.inputs, quantized.layers(directory))
    return model.eval()
