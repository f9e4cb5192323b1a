"""One `tinyllama serve`: what is measured, what is kept of an earlier attempt in the same folder, and when it is written.

bench.json is written after the offline part and after every point of the online sweep, each time as a whole. The same
command again goes on with a sweep that did not end; what was measured of another model, on another device or by another
vLLM is never kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve.bench import Measurement, Workload, header, measure, refuse_to_replace, write_bench
from serve.hardware import NO_LIMITS, Limits
from serve.online import OnlineWorkload, Sweep
from serve.source import Source
from serve.table import INCOMPLETE, markdown
from tinyllama.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from serve.engine import EngineConfig

ENGINE = (
    "dtype",
    "max_model_len",
    "eager",
    "draft",
)  # of the settings: what a model's numbers depend on in any workload


@dataclasses.dataclass(frozen=True)
class Job:
    """What to measure and where it goes. offline, online: None where that part is not asked for.

    configure: makes the engine's configuration for so many sequences of so many tokens. resume: keep what is finished
    even if nothing is missing. overwrite: replace what was measured of another model. limits: of the device, where the
    user said so.
    """

    source: Source
    target: Path
    configure: Callable[[int, int], EngineConfig]
    workload: Workload
    offline: bool = True
    online: OnlineWorkload | None = None
    resume: bool = False
    overwrite: bool = False
    limits: Limits = NO_LIMITS

    @property
    def log(self) -> Path:
        """What vLLM writes in this process and its engine."""
        return self.target / "vllm.log"

    @property
    def server_log(self) -> Path:
        """What vLLM's server writes."""
        return self.target / "server.log"

    def run(self) -> dict[str, Any]:
        """Measure all of it; returns what bench.json holds. UserError, online.ServerDied."""
        from serve.engine import importable_vllm, vllm_log

        refuse_to_replace(self.target)
        with importable_vllm(), local_traffic(), vllm_log(self.log) as terminal, progress(terminal) as shown:
            return _Run(self, shown).run()


class _Run:
    """The state of a running job."""

    def __init__(self, job: Job, shown: _Shown) -> None:
        from serve import engine

        self.job, self.shown = job, shown
        work = job.workload
        self.config = job.configure(work.num_sequences, work.tokens_per_request) if job.offline else None
        self.online_config = None
        if job.online:
            tokens = job.online.input_tokens + job.online.output_tokens
            self.online_config = job.configure(job.online.num_sequences, tokens)
        for config in (self.config, self.online_config):
            if config and config.kv_cache_bytes:
                shown.note(f"KV cache: {config.kv_cache_bytes / 2**20:,.0f} MiB")
        self.model_sha256 = job.source.content()  # read anew: an export may have been changed since its record
        used = self.config or self.online_config
        assert used is not None
        self.resolved = engine.resolved_settings(used)
        self.fresh = header(job.source, self.resolved, work)
        self.fresh["settings"]["model_sha256"] = self.model_sha256
        self.earlier = self._earlier()

    def _earlier(self) -> dict[str, Any] | None:
        """The bench.json that is there, if it is of this model on this device by this software."""
        try:
            found = json.loads((self.job.target / "bench.json").read_text())
            alike = all(found[key] == self.fresh[key] for key in ("format", "versions", "device"))
            names = (*ENGINE, "model_sha256")
            alike &= all(found["settings"].get(name) == self.fresh["settings"][name] for name in names)
            other = found["settings"]["model_sha256"] != self.model_sha256 and _is_measured(found)
            model = found["model"]["path"] if other else None
        except (OSError, RecursionError, *INCOMPLETE):
            return None
        if other and not self.job.overwrite:
            raise UserError(
                f"{self.job.target / 'bench.json'} is of another model, {model}",
                fix="give another --output, or --overwrite to replace it",
            )
        if not alike:
            return None
        try:  # all that goes on with it reads
            unfinished(found)
            markdown(found)
            if found.get("online") and self.job.online:
                Sweep(self.job.online, self._identity(), found["online"]).describe()
        except INCOMPLETE as error:
            raise UserError(
                f"{self.job.target / 'bench.json'} is incomplete ({error!r})", fix="move it away, to measure all anew"
            ) from None
        return found

    def run(self) -> dict[str, Any]:
        """Offline, then online."""
        job, earlier = self.job, self.earlier
        going_on = earlier is not None and (job.resume or unfinished(earlier))
        bench = self._offline(earlier, going_on)
        if job.online is None:
            if earlier and "online" in earlier:
                bench["online"] = earlier["online"]
            write_bench(bench, job.target)
            return bench
        from serve import online

        assert self.online_config is not None
        sweep = Sweep(job.online, self._identity(), earlier.get("online") if earlier and going_on else None)

        def save() -> None:
            bench["online"] = sweep.describe()
            write_bench(bench, job.target)
            self.shown.advance()

        if sweep.num_kept:
            self.shown.note(f"{sweep.num_kept} finished points of {len(sweep.points)} are kept")
        self.shown.start("online", len(sweep.points) - sweep.num_kept)
        save()
        if not sweep.complete:
            online.measure(job.source, self.online_config, sweep, job.server_log, save, self.shown.say)
        return bench

    def _identity(self) -> dict[str, Any]:
        """What every point of the sweep depends on besides its workload."""
        from serve import engine

        assert self.online_config is not None
        return {
            "engine": {**engine.resolved_settings(self.online_config), "prefix_caching": False},
            "model_sha256": self.model_sha256,
            "device": self.fresh["device"],
            "vllm": self.fresh["versions"]["vllm"],
        }

    def _offline(self, earlier: dict[str, Any] | None, going_on: bool) -> dict[str, Any]:
        """The bench with its offline part: measured, or of the earlier one where that holds."""
        job = self.job
        if earlier and earlier["throughput"]:
            asked = json.loads(json.dumps(dataclasses.asdict(job.workload)))
            asked["prompts_sha256"] = self.fresh["settings"]["prompts_sha256"]  # the file may have been edited
            same = all(earlier["settings"].get(name) == value for name, value in asked.items())
            if not job.offline or (going_on and same):
                self.shown.note("the offline measurement is kept")
                return {key: value for key, value in earlier.items() if key != "online"}
        if not job.offline:
            return self.fresh
        assert self.config is not None
        self.shown.say("loading vLLM (about half a minute)")

        def advance(what: str, cost: float) -> None:
            if what == "loaded":
                self.shown.start("measuring", Measurement.total_cost(job.workload))
            else:
                self.shown.say(what)
                self.shown.advance(cost)

        bench = measure(job.source, self.config, job.workload, job.log, advance, job.limits)
        bench["settings"]["model_sha256"] = self.model_sha256
        return bench


def _is_measured(bench: dict[str, Any]) -> bool:
    """Whether there is anything to lose."""
    online = bench.get("online") or {"points": []}
    return bool(bench["throughput"]) or any(point["status"] == "done" for point in online["points"])


def unfinished(bench: dict[str, Any]) -> bool:
    """Whether a sweep was planned of which something is missing."""
    online = bench.get("online")
    if not online:
        return False
    search = online["settings"].get("find_max_rate") and online["max_rate_under_slo"] is None
    return bool(search) or any(point["status"] != "done" for point in online["points"])


@contextlib.contextmanager
def local_traffic() -> Iterator[None]:
    """vLLM's client obeys HTTP_PROXY, for a server on this machine too; and would send a key that the server never asked
    for. `engine.importable_vllm`, which must be around it, puts the environment back.
    """
    import os

    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), "127.0.0.1,localhost")))
    os.environ.pop("OPENAI_API_KEY", None)
    yield


class _Shown:
    """The progress bar."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._task = bar.add_task("importing vLLM", total=None)

    def say(self, what: str) -> None:
        self._bar.update(self._task, description=what)

    def start(self, what: str, total: float) -> None:
        self._bar.reset(self._task, total=total, description=what)

    def advance(self, cost: float = 1) -> None:
        self._bar.update(self._task, advance=cost)

    def note(self, text: str) -> None:
        """A line that stays."""
        self._bar.console.print(text, soft_wrap=True, markup=False)


@contextlib.contextmanager
def progress(terminal: Any) -> Iterator[_Shown]:
    """A progress bar on `terminal` that vanishes at the end."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console: Console = Console(file=terminal, highlight=False)
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=console, transient=True) as bar:
        yield _Shown(bar)


def check(workload: Workload, online: OnlineWorkload | None, source: Source, max_model_len: int | None) -> None:
    """ConfigError if a request is longer than the context, UserError if nothing is to be measured."""
    workload.fits(source, max_model_len)
    if online and not online.loads:
        raise UserError("--rates and --concurrency are both empty", fix="give one of them, or --measure offline")
