"""A training checkpoint to a Hugging Face Llama directory, checked before it is called one.

Weights are written as safetensors in the training dtype, one tensor at a time; the tokenizer with the ids of the
training data. Then transformers loads the result, and its logits must equal ours. `tinyllama_export.json` records the
source step and a sha256 over the content, on which every later cache is keyed.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllama import __version__, checkpoint, model_source
from tinyllama.data.store import file_sha256
from tinyllama.errors import DISK_FULL, CheckpointError, ConfigError
from tinyllama.model_source import RECORD

if TYPE_CHECKING:
    from torch import Tensor

# transformers imports torchao wherever it is installed; that says which of its GPU kernels it cannot load, and how torch
# takes its types.
TALKATIVE = ("torchao", "torch.utils._pytree")
MAX_SHARD_BYTES = 5_000_000_000
PARTIAL = ".partial"  # what is being written, until it has its name
REFUSALS = (
    *DISK_FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR,
    errno.EEXIST, errno.ENAMETOOLONG,
)  # fmt: skip
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
    found = model_source.find(path, local=True)
    if not found.is_checkpoint:
        raise CheckpointError(
            f"{path} is not a checkpoint but a Hugging Face directory already", fix="give --quantize to quantize it"
        )
    source, target = found.path, Path(output)
    if tokenizer is not None and not Path(tokenizer).is_file():
        raise ConfigError(f"--tokenizer {tokenizer} is no file", fix="give the tokenizer.model of the training data")
    found.check(ours=True, tokenizer=tokenizer is None)
    refuse_to_replace(target)

    from tinyllama.model.hf import DTYPES
    from tinyllama.tokenizer.export import export_hf

    say = report or (lambda _: None)
    config = checkpoint.model_config(source)
    refuse_too_large(target, config.num_parameters * DTYPES[dtype].itemsize)
    say(f"verifying {source}")
    state = checkpoint.verify(source)
    with appearing(target) as partial:
        say("writing the tokenizer and proving its ids")
        tokenizer_report = export_hf(tokenizer or source / "tokenizer.model", partial)
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


@contextlib.contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A folder beside `target` to write into; `finish` gives it its name. Nothing of it is left if the block does not end
    well, however that is. UserError where the operating system refuses to write.
    """
    partial = target.with_name(f"{target.name}{PARTIAL}")
    made = [parent for parent in (target.parent, *target.parent.parents) if not parent.exists()]
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if target.exists():
            shutil.rmtree(_replaced(target), ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        code = _refused(error)
        if code is None:
            raise
        full = code in DISK_FULL
        raise ConfigError(
            f"writing {target} failed ({os.strerror(code)})",
            fix=f"nothing was left behind; {'free space, or ' if full else ''}give another --output",
        ) from None


def _replaced(target: Path) -> Path:
    """Where an earlier export lies while a new one takes its name."""
    return target.with_name(f"{target.name}.old{PARTIAL}")


def _refused(error: BaseException) -> int | None:
    """The errno of a disk or a folder that refuses, of Python's errors and of those that come as text out of Rust."""
    code = error.errno if isinstance(error, OSError) else None
    if code is None and isinstance(error, Exception) and (told := re.search(r"\(os error (\d+)\)", str(error))):
        code = int(told[1])
    return code if code in REFUSALS else None


def refuse_too_large(target: Path, size: int) -> None:
    """ConfigError where the disk of `target` has not so many bytes free: asked before anything is read."""
    folder = next(parent for parent in target.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if free < size:
        raise ConfigError(
            f"--output {target} needs {size / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free there",
            fix="free space, or give another --output",
        )


def refuse_to_replace(target: Path) -> None:
    """ConfigError where something lies that is no export, or that holds what no export wrote: it would be lost."""
    if not target.name or target.name == "..":
        raise ConfigError(f"--output {target} is no name", fix="give the folder to make, such as exports/1b")
    if target.name.endswith(PARTIAL):
        raise ConfigError(f"--output {target}: exports of such a name are unfinished ones", fix="give another name")
    if not os.path.lexists(target):
        return
    if not (target / RECORD).exists():
        raise ConfigError(f"{target} exists and is not an export", fix="give another --output")
    if target.is_symlink():
        raise ConfigError(f"--output {target} is a link", fix=f"give the folder itself, {target.resolve()}")
    if foreign := _foreign(target):
        raise ConfigError(
            f"{target} holds {foreign[0]}, which is no part of the export", fix="move it away, or give another --output"
        )


def _foreign(target: Path) -> list[str]:
    """Folders in an export, and files that its record does not list (those of older releases list none)."""
    try:
        own = json.loads((target / RECORD).read_text()).get("files")
    except (OSError, ValueError, AttributeError):
        own = None
    with os.scandir(target) as entries:
        found = [(entry.name, entry.is_dir()) for entry in entries]
    listed = {RECORD, *own} if isinstance(own, list) else None
    # Of hidden files, which desktops make, nobody would miss one.
    return sorted(n for n, folder in found if folder or (listed and n not in listed and not n.startswith(".")))


def finish(partial: Path, target: Path, record: dict[str, Any]) -> None:
    """Hash what was written into `record`, write that, and give the directory its final name."""
    refuse_to_replace(target)  # a long export later
    record["content_sha256"] = content_sha256(partial)
    record["files"] = sorted(os.listdir(partial))
    (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    old = _replaced(target)
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(target, old)
    try:
        os.replace(partial, target)
    except BaseException:
        if old.exists() and not target.exists():
            os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)  # also what a killed export has left
