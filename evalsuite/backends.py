"""Makes lm-eval's model object: `native` (our Llama), `hf` (transformers) or `vllm`. Each imported when asked for."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinyllama import checkpoint, model_source, processes, scratch
from tinyllama.errors import MissingExtraError, UserError, first_line
from tinyllama.model import stored
from tinyllama.model_source import ModelSource

BACKENDS = ("native", "hf", "vllm")
SAMPLING_SEED, VLLM_SEED = 1234, 0  # lm-eval's for torch, which is ours too; its vLLM engine's
CPU_ROWS = 16  # of the hf backend, whose search for the largest batch takes minutes on a CPU


@dataclasses.dataclass(frozen=True)
class ModelChoice:
    """What is evaluated, and how: `path` is a local directory or a hub id."""

    path: str
    backend: str
    dtype: str  # resolved
    batch_size: int | None  # rows; None: as many as the machine takes
    max_length: int | None = None
    copies: int = 1  # of the model, that share the items

    @property
    def local(self) -> bool:
        return not self.source.is_hub

    @functools.cached_property
    def source(self) -> ModelSource:
        """What `path` names. Found once, by `choose`: a run that trains on has another newest checkpoint an hour later."""
        return model_source.find(self.path, "--model")


def default_dtype(device_type: str) -> str:
    """What a model is computed in where nobody says it: on a GPU float32 is ten times slower than bfloat16."""
    return "float32" if device_type == "cpu" else "bfloat16"


def choose(
    model: str,
    backend: str | None,
    dtype: str | None,
    batch_size: int | None,
    max_length: int | None,
    copies: int | None = 1,
    *,
    offline: bool = False,
) -> ModelChoice:
    """Check the arguments and the model's files; derive the backend (native for local Llama directories and checkpoints,
    else hf) and the dtype (by the device). offline: no hub.
    """
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise UserError(f"--dtype {dtype}", fix="give float32, bfloat16 or float16")
    if max_length is not None and max_length < 1:
        raise UserError(f"--max-length {max_length}", fix="give 1 or more tokens")
    if backend not in (None, *BACKENDS):
        raise UserError(f"--backend {backend}", fix=f"give one of {', '.join(BACKENDS)}")
    if copies is not None and copies < 1:
        raise UserError(f"--data-parallel {copies}", fix="give 1 or more")
    source = model_source.find(model, "--model", offline=offline)
    derived = backend or ("hf" if source.is_hub else "native")
    if source.is_checkpoint and derived != "native":
        raise UserError(f"--backend {derived} cannot read a checkpoint", fix="use native, or tinyllama export first")
    if source.is_hub and derived == "native":
        raise UserError(f"--backend native needs a local directory, {model} is a hub id", fix="use hf or vllm")
    source.check(ours=False)
    if derived == "vllm" and source.kind == "directory" and source.config["model_type"] == "llama":
        stored.refuse_what_vllm_prefers(source.path)
    if derived == "native":
        try:
            source.check(ours=True)
        except UserError as error:
            raise UserError(
                f"{error.what}: not for --backend native", fix=f"{error.fix}; or use --backend hf"
            ) from None
    if copies is None:
        copies = _num_gpus() if derived == "native" else 1
    if copies > 1 and derived != "native":
        raise UserError(f"--data-parallel {copies} with --backend {derived}", fix="use --backend native")
    if dtype is None:
        dtype = default_dtype("cuda" if _has_cuda() else "cpu")
    choice = ModelChoice(os.path.expanduser(model), derived, dtype, batch_size, max_length, copies)
    vars(choice)["source"] = source  # where functools.cached_property looks for it
    return choice


def content_sha256(choice: ModelChoice) -> str:
    """Identity of the weights and tokenizer: of an export or checkpoint by content, of a hub id by name."""
    return choice.source.content_sha256()


def trained_tokens(choice: ModelChoice) -> int | None:
    """The tokens that a checkpoint, or the one behind an export, was trained on; None where nothing says it."""
    if choice.source.is_checkpoint:
        return int(checkpoint.read_json(choice.source.path / "state.json")["tokens"])
    tokens = choice.source.record().get("tokens")
    return tokens if isinstance(tokens, int) else None


def context(choice: ModelChoice) -> int | None:
    """Tokens that the model reads at most; None where that is not known before it is loaded.

    UserError where the choice asks for more than the model was made for.
    """
    own = None
    if choice.local:
        own = _longest(choice.source.config)
    _refuse_beyond(own, choice)
    return choice.max_length or own


def _longest(config: dict[str, Any]) -> int | None:
    """The context of a transformers configuration, under the names that lm-eval looks for."""
    config = config.get("text_config") or config
    known = (config.get(name) for name in ("n_positions", "max_position_embeddings", "n_ctx"))
    return next((length for length in known if isinstance(length, int)), None)


def _refuse_beyond(own: int | None, choice: ModelChoice) -> None:
    if own is not None and choice.max_length is not None and choice.max_length > own:
        raise UserError(
            f"--max-length {choice.max_length} exceeds the model's context of {own}", fix=f"give at most {own}"
        )


def sampling_seed(choice: ModelChoice) -> int:
    """What drawn tokens follow from."""
    return VLLM_SEED if choice.backend == "vllm" else SAMPLING_SEED


def make(choice: ModelChoice, log: Path) -> Any:
    """The lm-eval model object of a choice. UserError with the reason for a model that its backend cannot load."""
    try:
        return _make(choice, log)
    except Exception as error:  # those of tokenizers and safetensors have no other base
        known = isinstance(error, UserError | ModuleNotFoundError) or type(error).__name__ == "OutOfMemoryError"
        if choice.backend == "native" or known:
            raise
        reason = first_line(error)
        raise UserError(
            f"--backend {choice.backend} cannot load {choice.path} ({reason})", fix="use another --backend"
        ) from error


def _make(choice: ModelChoice, log: Path) -> Any:
    if choice.backend == "vllm":
        return _make_vllm(choice, log)
    from transformers.utils import logging

    logging.disable_progress_bar()
    if choice.backend == "native":
        from evalsuite.native import NativeLM

        return NativeLM.load(choice) if choice.copies == 1 else NativeLM.over_copies(choice)
    from evalsuite.counting import CountingHFLM

    if choice.dtype == "float32":
        exact_float32()
    model = CountingHFLM(
        pretrained=choice.source.loadable,
        dtype=choice.dtype,
        batch_size=choice.batch_size or ("auto" if _has_cuda() else CPU_ROWS),
        max_length=choice.max_length,
        device="cuda" if _has_cuda() else "cpu",
    )
    _refuse_beyond(_longest(model.config.to_dict()), choice)
    return model


def exact_float32() -> None:
    """From now on a GPU multiplies float32 as float32, whatever was set: TF32 keeps ten bits of each factor."""
    import torch

    torch.set_float32_matmul_precision("highest")


def _num_gpus() -> int:
    """GPUs of this machine, without initialising CUDA here; 1 where there is none."""
    import torch

    return max(1, torch.cuda.device_count())


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _make_vllm(choice: ModelChoice, log: Path) -> Any:
    """lm-eval's vLLM backend. It asks for the distribution `vllm`, which the CPU build has under another name."""
    import importlib.util

    if importlib.util.find_spec("vllm") is None:
        raise MissingExtraError("vllm", "cpu")
    if not _has_cuda():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # a fork would not carry its guardian's mark
    processes.guard_from_now_on()  # vLLM's engine outlives a process that is killed
    original = importlib.metadata.version

    def version(distribution_name: str) -> str:
        try:
            return original(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name == "vllm":
                return original("vllm-cpu")
            raise

    # vLLM itself tells its CPU build by what it is named: it must have looked before, and lm-eval be alone in asking now.
    from vllm.platforms import current_platform

    _ = current_platform.device_type
    importlib.metadata.version = version
    try:
        from evalsuite.vllm_backend import CheckedVLLM
    finally:
        importlib.metadata.version = original
    return CheckedVLLM(
        pretrained=choice.source.loadable,
        dtype=choice.dtype,
        batch_size="auto",
        max_model_len=choice.max_length,
        enforce_eager=not _has_cuda(),
        seed=VLLM_SEED,
    )


def watch(model: Any, report: Callable[[float], None]) -> None:
    """Have report called on the way with the finished part of each call, 0 to 1, where the backend tells it (native)."""
    if hasattr(model, "engine"):
        model.engine.on_progress = report


def close(model: Any) -> None:
    """End the processes of a model before this one ends. vLLM's, left to the interpreter's end, may abort it."""
    if hasattr(model, "engine"):
        model.engine.close()
    engine = getattr(getattr(model, "model", None), "llm_engine", None)
    if engine is not None:
        engine.engine_core.shutdown()


def tokenizer_directory(choice: ModelChoice) -> Path:
    """A Hugging Face tokenizer for the model: the export's own, or one written for a checkpoint, proven as any other."""
    if not choice.source.is_checkpoint:
        return Path(choice.path)
    from tinyllama.tokenizer.export import export_hf

    model = choice.source.path / "tokenizer.model"
    if not model.exists():
        raise UserError(f"{choice.path} holds no tokenizer.model", fix="export it with --tokenizer FILE")
    target = scratch.make("tinyllama-tokenizer-")
    export_hf(model, target)
    return target
