"""A Hugging Face Llama directory to a quantized one that vLLM and transformers load (compressed-tensors), proven.

Round to nearest, without data: each row (or group) of a matrix gets the scale that its largest weight needs. The matrices
of the layers are quantized, the embedding, the head and the norms are not. Scales, rounding and packing are
compressed-tensors' own; the files are then read back by it: every weight must lie within half a quantization step of its
source. The record says how far the logits moved on a text. Reading a quantized directory is `tinyllama/model/quantized.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tinyllama import __version__, model_source, scratch
from tinyllama.data.durable import cannot_write
from tinyllama.errors import CheckpointError, ConfigError, nearest
from tinyllama.export import (
    appearing,
    content_sha256,
    export_checkpoint,
    finish,
    refuse_to_replace,
    refuse_too_large,
    write_weights,
)
from tinyllama.model import quantized, tokenizer_files
from tinyllama.model.config import ModelConfig
from tinyllama.model.hf import DTYPES, lazy_tensors, load_model, read_tensors
from tinyllama.model.quantized import Quantization
from tinyllama.model.stored import read_config
from tinyllama.model_source import RECORD

if TYPE_CHECKING:
    from tinyllama.model.llama import Llama

IGNORED = ["lm_head"]
GROUPS = (128, 64, 32)  # sizes that vLLM's kernels know
PROBE_ROWS, PROBE_TOKENS = 4, 256
# fp32 arithmetic of values up to 127 steps: 127 * 2^-24 for the division and for the product.
STEP_TOLERANCE = 1e-4
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".index.json")


@dataclasses.dataclass(frozen=True)
class Scheme:
    """A scheme by the name that users give: compressed-tensors' preset and format."""

    preset: str
    format: str
    packed: bool = False
    by_channel: bool = False  # a preset of groups, with one scale for each row instead


SCHEMES = {
    "int8": Scheme("W8A8", "int-quantized"),
    "fp8": Scheme("FP8_DYNAMIC", "float-quantized"),
    "int8-weights": Scheme("W8A16", "pack-quantized", packed=True, by_channel=True),
    "int4-weights": Scheme("W4A16", "pack-quantized", packed=True),
}


def quantization(name: str, config: ModelConfig) -> Quantization:
    """compressed-tensors' scheme for a model's shape. ConfigError for an unknown name or a shape that has no groups."""
    from compressed_tensors.quantization import QuantizationStrategy, preset_name_to_scheme

    if name not in SCHEMES:
        raise ConfigError(f"--quantize {name} is no scheme", fix=nearest(name, list(SCHEMES)))
    chosen = SCHEMES[name]
    scheme = preset_name_to_scheme(chosen.preset, ["Linear"])
    if chosen.by_channel:
        scheme.weights.strategy, scheme.weights.group_size = QuantizationStrategy.CHANNEL, None
    elif scheme.weights.group_size:
        widths = {config.hidden_size, config.intermediate_size}
        fitting = [size for size in GROUPS if not any(width % size for width in widths)]
        if not fitting:
            raise ConfigError(
                f"--quantize {name} needs widths that are multiples of {GROUPS[-1]}, this model has {sorted(widths)}",
                fix="use int8, int8-weights or fp8",
            )
        scheme.weights.group_size = fitting[0]
    return Quantization(chosen.format, scheme)


def is_quantized_matrix(name: str) -> bool:
    """Whether a tensor of a Llama is quantized: the matrices of its layers."""
    return name.endswith("_proj.weight")


def _round_up(values: Tensor, dtype: torch.dtype) -> Tensor:
    """In `dtype`, never below the value: a scale that is too small would push the largest weight off the grid."""
    rounded = values.to(dtype)
    above = torch.nextafter(rounded, torch.full_like(rounded, math.inf))
    return torch.where(rounded.to(values.dtype) < values, above, rounded)


def scales(weight: Tensor, how: Quantization, dtype: torch.dtype) -> Tensor:
    """(rows, 1) or (rows, groups): the step of each row or group of an fp32 (rows, columns) matrix.

    The largest weight of a row becomes the end of the grid: 127.5, 7.5 or 448 steps. int8 and fp8 keep fp32 scales, as
    vLLM's parameters are; vLLM holds those of packed weights in the model's `dtype`, so they are made in it.
    """
    from compressed_tensors.quantization.utils import calculate_qparams

    arguments = how.scheme.weights
    groups = weight.unflatten(1, (-1, arguments.group_size)) if arguments.group_size else weight.unsqueeze(1)
    found, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
    return _round_up(found, dtype if how.format == "pack-quantized" else torch.float32)


def compress(weight: Tensor, how: Quantization, dtype: torch.dtype) -> dict[str, Tensor]:
    """The stored parts of one matrix (rows, columns). CheckpointError if it holds NaN or infinity."""
    from compressed_tensors.compressors import BaseCompressor

    weight = weight.float()
    if not torch.isfinite(weight).all():
        raise CheckpointError("a weight is not a finite number", fix="export an earlier checkpoint")
    step = scales(weight, how, dtype)
    compressor = BaseCompressor.get_value_from_registry(how.format)
    parts = compressor.compress({"weight": weight, "weight_scale": step.float()}, how.scheme)
    return {**parts, "weight_scale": step}


def quantized_tensors(
    source: Iterator[tuple[str, Tensor]], how: Quantization, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """What is written, from a plain Llama's tensors: parts of the matrices, everything else in `dtype`."""
    for name, tensor in source:
        if not is_quantized_matrix(name):
            if not torch.isfinite(tensor).all():
                raise CheckpointError(f"{name} is not finite", fix="export an earlier checkpoint")
            yield name, tensor.to(dtype)
            continue
        layer = name.removesuffix(".weight")
        try:
            parts = compress(tensor, how, dtype)
        except CheckpointError as error:
            raise CheckpointError(f"{name} is not finite", fix=error.fix) from None
        for part, stored in parts.items():
            yield f"{layer}.{part}", stored


def steps_off(weight: Tensor, stored: Tensor, step: Tensor, how: Quantization) -> float:
    """Largest |stored - weight| of a matrix in quantization steps; at most 0.5 for rounding to nearest.

    int: a step is the scale. fp8: the distance of neighbouring E4M3 values of that size, times the scale.
    """
    arguments = how.scheme.weights
    step = step.float().repeat_interleave(weight.shape[1] // step.shape[1], dim=1)
    distance = (stored - weight.float()).abs() / step
    if str(getattr(arguments.type, "value", arguments.type)) == "float":
        exponent = torch.frexp((weight.float() / step).abs()).exponent - 1  # 2^exponent <= |value| < 2^(exponent + 1)
        distance = distance / torch.exp2(exponent.clamp(min=-6).float() - 3)  # E4M3: 3 bits behind the point, from 2^-6
    return float(distance.max())


def check_weights(source: Path, exported: Path, how: Quantization) -> float:
    """Read the written files back with compressed-tensors; the largest distance of any weight in steps. CheckpointError
    where that is more than half a step, or where another tensor is not its source.
    """
    originals, parts = lazy_tensors(source), lazy_tensors(exported)
    worst = 0.0
    for name, stored in quantized.tensors(exported, how):
        if name not in originals:
            raise CheckpointError(f"{exported}: unexpected tensor {name}", fix="report this; use no such export")
        original = originals.pop(name)()
        if is_quantized_matrix(name):
            off = steps_off(original, stored, parts[f"{name}_scale"](), how)
        else:
            off = 0.0 if torch.equal(original.to(stored.dtype), stored) else math.inf
        if not off <= 0.5 + STEP_TOLERANCE:  # also catches NaN
            raise CheckpointError(f"{name} is {off:.3f} quantization steps off", fix="report this; use no such export")
        worst = max(worst, off)
    if originals:
        raise CheckpointError(f"{exported} lacks {next(iter(originals))}", fix="report this; use no such export")
    return worst


def probe(directory: Path, config: ModelConfig) -> Tensor:
    """(rows, T) ids of English prose that ships with CPython (its help topics), in the model's own tokenizer."""
    import pydoc_data.topics

    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)[:12])
    ids = tokenizer_files.load(directory)(text, add_special_tokens=False)["input_ids"]
    length = min(PROBE_TOKENS, config.max_position_embeddings, len(ids))
    rows = min(PROBE_ROWS, len(ids) // length)
    return torch.tensor(ids[: rows * length]).view(rows, length)


@torch.no_grad()
def compare_logits(source: Path, exported: Path) -> dict[str, float | int]:
    """How far the logits moved on `probe`, both models computed in fp32, inputs rounded as the quantized model rounds them.

    max and mean of |difference|, the mean Kullback-Leibler divergence in nats of the quantized distribution from the
    source's, the share of positions with the same most likely token, and both losses in nats a token. CheckpointError for
    logits that are not finite.
    """
    config = ModelConfig.from_hf(exported)
    ids = probe(exported, config)
    before = _logits(load_model(source), ids)
    after = _logits(load_model(exported), ids)
    if not (torch.isfinite(before).all() and torch.isfinite(after).all()):
        which = source if not torch.isfinite(before).all() else exported
        raise CheckpointError(f"the logits of {which} are not finite", fix="use no such model")
    p, q = before.log_softmax(-1), after.log_softmax(-1)
    difference = (after - before).abs()
    return {
        "tokens": ids.numel(),
        "max_difference": float(difference.max()),
        "mean_difference": float(difference.mean()),
        "kl_nats": float((p.exp() * (p - q)).sum(-1).mean()),
        "same_greedy_token": float((before.argmax(-1) == after.argmax(-1)).float().mean()),
        "loss_before": _loss(p, ids),
        "loss_after": _loss(q, ids),
    }


def _loss(log_probabilities: Tensor, ids: Tensor) -> float:
    """Mean cross-entropy of the next token."""
    return float(-log_probabilities[:, :-1].gather(2, ids[:, 1:, None]).mean())


def _logits(model: Llama, ids: Tensor) -> Tensor:
    return torch.cat([model(row.unsqueeze(0)) for row in ids])


def _write_config(source: Path, partial: Path, how: Quantization, dtype: str) -> None:
    """The source's config.json with the part that tells vLLM and transformers what the files hold."""
    import compressed_tensors
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    described = QuantizationConfig(
        config_groups={"group_0": how.scheme},
        format=how.format,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=IGNORED,
    )
    config = read_config(source)
    config.pop("dtype", None)
    config["torch_dtype"] = dtype
    config["quantization_config"] = {"version": compressed_tensors.__version__, **described.model_dump(mode="json")}
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def quantize_directory(
    source: Path, target: Path, name: str, *, dtype: str = "bfloat16", check: bool = True, report: Callable[[str], None]
) -> dict[str, Any]:
    """Write the quantized directory `target` from a Hugging Face Llama directory; returns its record.

    dtype: of what is not quantized. The directory appears by one rename; UserError if anything is off, also a source that
    is quantized already. `check`: compare the logits; the weights are always checked.
    """
    refuse_to_replace(target)
    config = ModelConfig.from_hf(source)
    kept = model_source.find(source, local=True).record() or {"source": source.name}
    if quantized.config_of(source):
        raise ConfigError(f"{source} is quantized already", fix="quantize the model that it was made from")
    if target.resolve() == source.resolve():
        raise ConfigError(f"--output {target} is the model itself", fix="give another --output")
    how = quantization(name, config)
    refuse_too_large(target, config.num_parameters * (1 if SCHEMES[name].packed else 2) // 2)
    with appearing(target) as partial:
        report("writing the quantized weights")
        after = write_weights(quantized_tensors(read_tensors(source), how, DTYPES[dtype]), partial)
        for file in sorted(source.iterdir()):
            if file.is_file() and not file.name.endswith(WEIGHT_SUFFIXES) and file.name not in ("config.json", RECORD):
                shutil.copy2(file, partial)
        _write_config(source, partial, how, dtype)
        report("reading them back")
        found: dict[str, Any] = {
            "scheme": name,
            "description": how.describe(),
            "format": how.format,
            "unquantized_dtype": dtype,
            "source_content_sha256": content_sha256(source),
            "bytes_before": config.num_parameters * DTYPES[dtype].itemsize,
            "bytes_after": after,
            "largest_error_steps": check_weights(source, partial, how),
        }
        if check:
            report("comparing logits with the source's")
            found["logits"] = compare_logits(source, partial)
        record = {
            **{key: value for key, value in kept.items() if key not in ("content_sha256", "logits_difference")},
            "dtype": dtype,
            "num_parameters": config.num_parameters,
            "quantization": found,
            "tinyllama": __version__,
            "exported_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        finish(partial, target, record)
    return record


def export_quantized(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    name: str,
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    dtype: str = "bfloat16",
    check: bool = True,
    report: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Quantize a training checkpoint, a run's newest, or a Hugging Face Llama directory.

    A checkpoint is exported plainly first, beside the output and in fp32, with the checks of every export; that one is
    removed at the end.
    """
    say = report or (lambda _: None)
    given, target = Path(path), Path(output)
    if name not in SCHEMES:
        raise ConfigError(f"--quantize {name} is no scheme", fix=nearest(name, list(SCHEMES)))
    source = model_source.find(given, local=True)
    source.check(ours=True, tokenizer=not (source.is_checkpoint and tokenizer))
    if not source.is_checkpoint:
        return quantize_directory(source.path, target, name, dtype=dtype, check=check, report=say)
    refuse_to_replace(target)
    shape = source.llama()
    quantization(name, shape)  # refuses a shape that the scheme cannot have
    refuse_too_large(target, shape.num_parameters * DTYPES["float32"].itemsize)
    made = [parent for parent in (target.parent, *target.parent.parents) if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with scratch.folder(f".{target.name}.", target.parent) as folder:
            plain = folder / source.path.name
            export_checkpoint(source.path, plain, tokenizer=tokenizer, dtype="float32", check=check, report=say)
            return quantize_directory(plain, target, name, dtype=dtype, check=check, report=say)
    except OSError as error:
        raise cannot_write(error, target.parent) from None
    finally:
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()  # if nothing was written there
