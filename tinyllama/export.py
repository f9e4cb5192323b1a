"""A training checkpoint to a Hugging Face Llama directory, checked before it is called one.

Weights are written as safetensors in the training dtype, one tensor at a time; the tokenizer with the ids of the
training data. Then transformers loads the result, and its logits must equal ours. `tinyllama_export.json` records the
source step and a sha256 over the content, on which every later cache is keyed.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllama import __version__, checkpoint
from tinyllama.data.store import file_sha256
from tinyllama.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor

# transformers imports torchao wherever it is installed; that says which of its GPU kernels it cannot load, and how torch
# takes its types.
TALKATIVE = ("torchao", "torch.utils._pytree")
MAX_SHARD_BYTES = 5_000_000_000
RECORD = "tinyllama_export.json"
# The check runs in fp32, where both sides do the same operations; what is left is the order of sums.
LOGITS_TOLERANCE = 2e-4


def content_sha256(directory: str | os.PathLike[str]) -> str:
    """One hash over the weights, configuration and tokenizer of a model directory (not over the record of its making)."""
    root = Path(directory)
    digest = hashlib.sha256()
    for path in sorted(root.iterdir()):
        if path.is_file() and path.name != RECORD:
            digest.update(f"{path.name}:{file_sha256(path)}\n".encode())
    return digest.hexdigest()


def write_weights(tensors: Iterable[tuple[str, Tensor]], target: Path) -> int:
    """Tensors as `model.safetensors`, or in several files of at most MAX_SHARD_BYTES with an index; gives their bytes."""
    from safetensors.torch import save_file

    files: list[dict[str, Any]] = [{}]
    size = total = 0
    parts: list[tuple[str, list[str]]] = []
    for name, tensor in tensors:
        converted = tensor.contiguous()
        bytes_ = converted.numel() * converted.element_size()
        if size and size + bytes_ > MAX_SHARD_BYTES:
            parts.append(_flush(files.pop(), target, len(parts), save_file))
            files.append({})
            size = 0
        files[-1][name] = converted
        size, total = size + bytes_, total + bytes_
    parts.append(_flush(files.pop(), target, len(parts), save_file))
    if len(parts) == 1:
        os.replace(target / parts[0][0], target / "model.safetensors")
        return total
    names = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    for (partial, _), name in zip(parts, names, strict=True):
        os.replace(target / partial, target / name)
    weight_map = {tensor: name for (_, tensors), name in zip(parts, names, strict=True) for tensor in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return total


def _flush(tensors: dict[str, Any], target: Path, number: int, save_file: Callable[..., None]) -> tuple[str, list[str]]:
    name = f"part-{number:05d}"
    save_file(tensors, target / name, metadata={"format": "pt"})
    return name, list(tensors)


def check_logits(source: Path, exported: Path, dtype: str) -> float:
    """Largest difference between our logits and transformers' LlamaForCausalLM's, both fp32, on a fixed random batch.

    Ours come from the checkpoint's weights rounded to `dtype`, as the export holds them. CheckpointError above
    LOGITS_TOLERANCE (relative to the largest logit).
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as their_logging

    from tinyllama.model.hf import DTYPES, fill
    from tinyllama.model.llama import Llama

    config = checkpoint.model_config(source)
    with torch.device("meta"):
        ours = Llama(config)
    ours = ours.to_empty(device="cpu")
    fill(ours, ((n, t.to(DTYPES[dtype]).float()) for n, t in checkpoint.read_weights(source)), str(source))
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    their_logging.disable_progress_bar()
    theirs = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (2, min(128, config.max_position_embeddings)), generator=generator)
    with torch.no_grad():
        expected = ours.eval()(ids)
        difference = (expected - theirs.eval()(ids).logits).abs().max() / expected.abs().max().clamp(min=1)
    if not difference <= LOGITS_TOLERANCE:  # also catches NaN
        raise CheckpointError(
            f"the export's logits differ from training's by {float(difference):.2e}",
            fix="report this; use no such export",
        )
    return float(difference)


def export_checkpoint(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    dtype: str = "bfloat16",
    check: bool = True,
    report: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Write the Hugging Face directory `output` from a checkpoint (or a run's newest) of any number of ranks.

    tokenizer: a tokenizer.model, where the checkpoint holds none. Returns the record that is also written to
    `tinyllama_export.json`. The directory appears by one rename; CheckpointError or ConfigError if anything is off.
    """
    from tinyllama.model.hf import DTYPES
    from tinyllama.tokenizer.export import export_hf

    say = report or (lambda _: None)
    source, target = checkpoint.resolve(path), Path(output)
    refuse_to_replace(target)
    say(f"verifying {source}")
    state = checkpoint.verify(source)
    config = checkpoint.model_config(source)
    model_file = Path(tokenizer) if tokenizer else source / "tokenizer.model"
    if not model_file.exists():
        raise CheckpointError(f"{source} holds no tokenizer.model", fix="give it with --tokenizer FILE")

    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    say("writing the tokenizer and proving its ids")
    tokenizer_report = export_hf(model_file, partial)
    say("writing the weights")
    write_weights(((name, tensor.to(DTYPES[dtype])) for name, tensor in checkpoint.read_weights(source)), partial)
    (partial / "config.json").write_text(json.dumps(config.to_hf(dtype=dtype), indent=2) + "\n")
    generation = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2}
    (partial / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    record = {
        "source": source.name,
        "step": state["step"],
        "tokens": state["tokens"],
        "dtype": dtype,
        "num_parameters": config.num_parameters,
        "mixture_sha256": state["mixture_sha256"],
        "tokenizer": tokenizer_report,
        "tinyllama": __version__,
        "exported_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if check:
        say("comparing logits with transformers")
        record["logits_difference"] = check_logits(source, partial, dtype)
    finish(partial, target, record)
    return record


def refuse_to_replace(target: Path) -> None:
    """ConfigError where something lies that is no export."""
    if target.exists() and not (target / RECORD).exists():
        raise ConfigError(f"{target} exists and is not an export", fix="give another --output")


def finish(partial: Path, target: Path, record: dict[str, Any]) -> None:
    """Hash what was written into `record`, write that, and give the directory its final name."""
    record["content_sha256"] = content_sha256(partial)
    (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    if target.exists():
        shutil.rmtree(target)
    os.replace(partial, target)
