"""Weights to and from Hugging Face directories (safetensors), one tensor at a time.

Loading is a strict check of names and shapes and a copy; weights that our model holds fused are filled as views
(`fused.py`). `load_model` gives a `Llama` from an export or any Hugging Face Llama directory.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from tinyllama.errors import CheckpointError
from tinyllama.model.config import ModelConfig
from tinyllama.model.fused import hf_parameters
from tinyllama.model.llama import Llama

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face's name and shape of every parameter of a model of this configuration, without allocating any."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in hf_parameters(Llama(config))}


def check_names(found: dict[str, tuple[int, ...]], config: ModelConfig, where: str) -> None:
    """Refuse a set of tensors that is not exactly this model's: missing, unexpected or misshapen."""
    expected = shapes(config)
    for name, shape in expected.items():
        if name not in found:
            raise CheckpointError(f"{where}: tensor {name} is missing", fix="write it again from a complete checkpoint")
        if tuple(found[name]) != shape:
            raise CheckpointError(
                f"{where}: {name} has shape {tuple(found[name])}, the configuration says {shape}",
                fix="use the configuration that the weights were trained with",
            )
    for name in found:
        if name not in expected and not name.endswith("rotary_emb.inv_freq"):
            raise CheckpointError(f"{where}: unexpected tensor {name}", fix="only plain Llama models are supported")


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a Hugging Face directory, through its index if it has one."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    files = [directory / name for name in names]
    for file in files:
        if not file.exists():
            raise CheckpointError(f"{file} does not exist", fix="give a complete Hugging Face directory (safetensors)")
    return files


def lazy_tensors(directory: Path) -> dict[str, Callable[[], Tensor]]:
    """For every tensor of a Hugging Face directory what reads it, in the order of the files."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, Callable[[], Tensor]] = {}
    for file in weight_files(directory):
        try:
            handle = safe_open(file, framework="pt")
        except SafetensorError as error:
            raise CheckpointError(f"{file} is corrupt ({error})", fix="export the model again") from None
        for name in handle.keys():  # noqa: SIM118 - a safetensors handle is not a dictionary
            found[name] = functools.partial(handle.get_tensor, name)
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
    with torch.device("meta"):
        model = Llama(config)
    model = model.to_empty(device=device).to(DTYPES[dtype])
    if quantization is None:
        fill(model, read_tensors(directory), str(directory))
    else:
        fill(model, quantized.tensors(directory, quantization), str(directory))
        quantized.round_inputs(model, quantization.inputs, quantized.layers(directory))
    return model.eval()
