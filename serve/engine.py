"""The door to vLLM: an engine in this process on whatever device vLLM finds, CPU or CUDA.

vLLM logs to a file; on the CPU it needs the size of its key-value cache beforehand. The distribution is named `vllm` or
`vllm-cpu`; the module is the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinyllama.errors import MissingExtraError, UserError


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """How vLLM is started. kv_cache_gib is for the CPU, where vLLM cannot measure what is free."""

    model: str
    dtype: str
    max_model_len: int
    kv_cache_gib: int
    max_num_seqs: int
    eager: bool
    seed: int


def require() -> None:
    """MissingExtraError unless vLLM is installed."""
    if importlib.util.find_spec("vllm") is None:
        raise MissingExtraError("vllm", "cpu")


def prepare_environment(kv_cache_gib: int) -> None:
    """Set what vLLM reads when it is imported."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(kv_cache_gib))
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_DO_NOT_TRACK", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@contextlib.contextmanager
def output_to(log: Path) -> Iterator[None]:
    """Send this process's (and its children's) standard output and error to a file: vLLM writes to both, much."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with open(log, "ab") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for target, source in zip((1, 2), saved, strict=True):
            os.dup2(source, target)
            os.close(source)


def last_error(log: Path) -> str:
    """The last line of vLLM's log that names an error: what to tell the user."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    errors = [line for line in lines if "Error" in line and "engine core" not in line.lower()]
    return (errors or lines or ["no output"])[-1].strip()[-300:]


@contextlib.contextmanager
def engine(settings: EngineSettings, log: Path) -> Iterator[Any]:
    """A running vllm.LLM, shut down at the end. UserError with vLLM's own reason if it cannot load the model."""
    require()
    prepare_environment(settings.kv_cache_gib)
    llm = None
    try:
        with output_to(log):
            from vllm import LLM

            llm = LLM(
                model=settings.model,
                dtype=settings.dtype,
                max_model_len=settings.max_model_len,
                max_num_seqs=settings.max_num_seqs,
                enforce_eager=settings.eager,
                enable_prefix_caching=False,
                seed=settings.seed,
                disable_log_stats=True,
            )
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(
            f"vLLM cannot load {settings.model} ({_reason(error, log)})", fix=f"see {log}; --kv-cache-gib sets the cache"
        ) from None
    try:
        yield llm
    finally:
        with output_to(log):
            llm.llm_engine.engine_core.shutdown()
            del llm


def _reason(error: Exception, log: Path) -> str:
    text = str(error).strip().splitlines()
    first = text[0] if text else type(error).__name__
    return last_error(log) if "engine core" in first.lower() or "Engine core" in first else first[:300]


def device() -> dict[str, Any]:
    """What vLLM runs on: kind, name, cores."""
    import torch

    if torch.cuda.is_available():
        return {"kind": "cuda", "name": torch.cuda.get_device_name(), "count": torch.cuda.device_count()}
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return {"kind": "cpu", "name": name, "count": os.cpu_count()}


def versions() -> dict[str, str]:
    """Versions of what decides a measurement."""
    import torch
    import vllm

    from tinyllama import __version__

    return {
        "tinyllama": __version__,
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def model_length(model: str) -> int | None:
    """max_position_embeddings of a local model directory; None for a hub id."""
    path = Path(model) / "config.json"
    if not path.exists():
        return None
    return json.loads(path.read_text()).get("max_position_embeddings")
