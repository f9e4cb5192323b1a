"""The preparation as datatrove pipelines: read and tokenize, lay out, pack, publish. The door to datatrove.

Each stage is a list of datatrove steps, run by one of its executors: processes of this machine, Slurm or Ray. The steps
keep no state but what `work` has on disk, so any of them can be killed and run again, by any executor. Other datatrove
steps (filters, say) can stand between `ReadInputs` and `TokenizeAndWrite`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from tinyllama.data.documents import Reader
from tinyllama.data.work import PartWriter, Work, read_json, write_json
from tinyllama.errors import DataError, MissingExtraError, UserError
from tinyllama.tokenizer.cached import CachedEncoder
from tinyllama.tokenizer.sentencepiece_model import Tokenizer

try:
    from datatrove.data import Document
    from datatrove.executor.base import PipelineExecutor
    from datatrove.executor.local import LocalPipelineExecutor
    from datatrove.pipeline.base import PipelineStep
except ImportError:
    raise MissingExtraError("datatrove", "data") from None

REPORT_SECONDS = 0.5
CHECKED = 256  # one document in so many is compared with SentencePiece,
CHECKED_CHARACTERS = 1 << 18  # unless it is longer: SentencePiece needs some fifty times the text's memory
FIX_DISK = "free space and run the same command again; finished files are kept"


@dataclasses.dataclass(frozen=True)
class Totals:
    """How far a preparation is: bytes of input read, of all; text, documents and tokens written by this run."""

    stage: str
    read_bytes: int
    total_bytes: int
    text_bytes: int = 0
    documents: int = 0
    tokens: int = 0
    files: int = 0
    total_files: int = 0


def is_validation(data: bytes, seed: int, fraction: float) -> bool:
    """Whether a document is held out: a function of its UTF-8 and the seed alone, so that copies stay on one side."""
    digest = hashlib.blake2b(data, digest_size=8, key=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def share(sizes: list[int], rank: int, world_size: int) -> list[int]:
    """The files of one task: dealt out by size, back and forth, so that the tasks are about equal."""
    by_size = sorted(range(len(sizes)), key=lambda index: (-sizes[index], index))
    period = 2 * world_size
    mine = [i for n, i in enumerate(by_size) if n % period in (rank, period - 1 - rank)]
    return sorted(mine)


class _Shared:
    """What the two steps of a task tell each other; they are copied together."""

    def __init__(self) -> None:
        self.readers: dict[int, Reader] = {}


class ReadInputs(PipelineStep):
    """Reads the unfinished files of a task, one after another, into datatrove documents."""

    name, type = "tinyllama inputs", "📖 - READER"

    def __init__(self, folder: str, shared: _Shared) -> None:
        super().__init__()
        self.folder, self.shared = folder, shared

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        work = Work.load(Path(self.folder))
        files = work.plan.files
        for index in share([file.size_bytes for file in files], rank, world_size):
            if work.is_finished(index):
                continue
            reader = Reader(files[index], work.plan.settings.rules)
            self.shared.readers[index] = reader
            for text in reader:
                yield Document(text=text, id=f"{files[index].name}/{reader.num_records - 1}", metadata={"input": index})


class TokenizeAndWrite(PipelineStep):
    """Tokenizes with SentencePiece's ids and writes each input file's part."""

    name, type = "tinyllama tokens", "🔢 - TOKENIZER"

    def __init__(self, folder: str, shared: _Shared, plain: bool = False) -> None:
        super().__init__()
        self.folder, self.shared, self.plain = folder, shared, plain

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> None:  # type: ignore[override]
        work = Work.load(Path(self.folder))
        encoder = CachedEncoder(Tokenizer.load(work.folder / "tokenizer.model"), work.plan.settings.dtype)
        if self.plain:
            encoder.pattern = None
        report = _Report(work, rank)
        try:
            for index, documents in itertools.groupby(data, key=lambda document: document.metadata["input"]):
                self._finish_empty(work, before=index)
                self._write(work, index, documents, encoder, report)
            self._finish_empty(work, before=None)
            report.write()
        except OSError as error:
            raise DataError(
                f"writing {error.filename or work.folder} failed ({error.strerror or error})", fix=FIX_DISK
            ) from None

    def _finish_empty(self, work: Work, before: int | None) -> None:
        """Files that gave no document at all are finished too."""
        for index in [i for i in self.shared.readers if i != before]:
            PartWriter(work, index).finish(self.shared.readers.pop(index))

    def _write(self, work: Work, index: int, documents: Any, encoder: CachedEncoder, report: _Report) -> None:
        settings, reader = work.plan.settings, self.shared.readers[index]
        part = PartWriter(work, index)
        try:
            for number, document in enumerate(documents):
                text: str = document.text
                utf8, encoded = text.encode(), encoder.encode(text)
                if number % CHECKED == 0 and len(text) <= CHECKED_CHARACTERS:
                    encoder.check(text, encoded)
                held_out = is_validation(utf8, settings.seed, settings.validation_fraction)
                part.add("validation" if held_out else "train", encoded, len(utf8))
                report.add(reader, len(utf8), 1 + len(encoded) // work.width)
            part.finish(reader)
        finally:
            part.abandon()
        report.file_done(reader)
        del self.shared.readers[index]


class _Report:
    """Tells, in a file, how far one task is."""

    def __init__(self, work: Work, rank: int) -> None:
        self.path = work.folder / "progress" / f"{rank:06d}.json"
        self.counts = {"read_bytes": 0, "text_bytes": 0, "documents": 0, "tokens": 0, "files": 0}
        self.in_file = 0
        self.due = 0.0

    def add(self, reader: Reader, text_bytes: int, tokens: int) -> None:
        counts = self.counts
        counts["text_bytes"] += text_bytes
        counts["documents"] += 1
        counts["tokens"] += tokens
        self.in_file = reader.bytes_read
        if (now := time.monotonic()) >= self.due:
            self.due = now + REPORT_SECONDS
            self.write()

    def file_done(self, reader: Reader) -> None:
        self.counts["read_bytes"] += reader.file.size_bytes
        self.counts["files"] += 1
        self.in_file = 0

    def write(self) -> None:
        write_json(self.path, {**self.counts, "read_bytes": self.counts["read_bytes"] + self.in_file})


class LayOut(PipelineStep):
    """Decides which tokens go to which shard, once every part is there."""

    name, type = "tinyllama layout", "🧮 - LAYOUT"

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:  # type: ignore[override]
        Work.load(Path(self.folder)).lay_out()


class Pack(PipelineStep):
    """Writes a task's share of the shards."""

    name, type = "tinyllama shards", "💾 - WRITER"

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:  # type: ignore[override]
        work = Work.load(Path(self.folder))
        try:
            for split, number in work.shards()[rank::world_size]:
                work.pack(split, number)
        except OSError as error:
            raise DataError(
                f"writing {error.filename or work.folder} failed ({error.strerror or error})", fix=FIX_DISK
            ) from None


class Publish(PipelineStep):
    """Writes the manifest and gives the store its name."""

    name, type = "tinyllama manifest", "✅ - MANIFEST"

    def __init__(self, folder: str, target: str) -> None:
        super().__init__()
        self.folder, self.target = folder, target

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:  # type: ignore[override]
        Work.load(Path(self.folder)).publish(Path(self.target))


@dataclasses.dataclass(frozen=True)
class Stage:
    """One pipeline, and into how many tasks it is divided."""

    name: str
    steps: list[PipelineStep]
    tasks: int


def stages(work: Work, target: Path, tasks: int, plain: bool = False) -> list[Stage]:
    """The whole preparation. `tasks` bounds how finely the work is divided; it does not change the result."""
    folder, shared = str(work.folder.resolve()), _Shared()
    return [
        Stage(
            "tokenize",
            [ReadInputs(folder, shared), TokenizeAndWrite(folder, shared, plain)],
            max(1, min(tasks, len(work.plan.files))),
        ),
        Stage("layout", [LayOut(folder)], 1),
        Stage("pack", [Pack(folder)], tasks),
        Stage("publish", [Publish(folder, str(target.resolve()))], 1),
    ]


# -- In this process --------------------------------------------------------------------------------------------------


def run_here(stage: Stage) -> None:
    """One stage without any executor: for tests and notebooks, and for stages of one short task."""
    for rank in range(stage.tasks):
        data: Any = None
        for step in stage.steps:
            data = step.run(data, rank, stage.tasks)


# -- Processes of this machine ----------------------------------------------------------------------------------------


def _start_worker(parent: int) -> None:
    """A worker dies with its parent, leaves Ctrl-C to it, and keeps datatrove's log lines in the log files."""
    import ctypes

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)
    sys.stderr = open(os.devnull, "w")


class ProcessesExecutor(LocalPipelineExecutor):
    """datatrove's local executor on a pool that notices when a worker is killed, where multiprocessing's waits for ever.

    Nothing is skipped by datatrove's own marks: the parts on disk say what is finished.
    """

    def __init__(self, stage: Stage, workers: int, logging_dir: str, poll: Callable[[], None]) -> None:
        super().__init__(
            pipeline=stage.steps, tasks=stage.tasks, workers=workers, logging_dir=logging_dir, skip_completed=False
        )
        self.poll = poll

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "poll"}

    def run(self) -> None:
        """Every task, `workers` at a time. The first error stops the others and is raised."""
        context = multiprocessing.get_context("spawn")
        workers = min(self.workers, self.tasks)
        pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(os.getpid(),))
        try:
            waiting: set[Future] = {pool.submit(self._run_for_rank, rank, 1) for rank in range(self.tasks)}
            while waiting:
                done, waiting = wait(waiting, timeout=REPORT_SECONDS, return_when=FIRST_COMPLETED)
                self.poll()
                for future in done:
                    future.result()
        except BrokenProcessPool:
            raise DataError(
                "a worker was killed (by the system, if memory ran out)",
                fix="run the same command again, with fewer --workers if memory is short; finished files are kept",
            ) from None
        except BaseException:
            for process in list((pool._processes or {}).values()):
                process.kill()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def read_totals(work: Work, before: Totals) -> Totals:
    """What the tasks have reported, added to what was there `before`."""
    sums = dict.fromkeys(("read_bytes", "text_bytes", "documents", "tokens", "files"), 0)
    for path in (work.folder / "progress").glob("*.json"):
        for key, value in (read_json(path) or {}).items():
            sums[key] += value
    return Totals(
        before.stage,
        before.read_bytes + sums["read_bytes"],
        before.total_bytes,
        sums["text_bytes"],
        sums["documents"],
        sums["tokens"],
        before.files + sums["files"],
        before.total_files,
    )


def run_local(work: Work, target: Path, workers: int, plain: bool, progress: Callable[[Totals], None] | None) -> None:
    """Every stage on this machine's cores; `workers` = 0 runs them in this process."""
    finished = [f for i, f in enumerate(work.plan.files) if work.is_finished(i)]
    total = sum(file.size_bytes for file in work.plan.files)
    read = sum(file.size_bytes for file in finished)
    before = Totals("tokenize", read, total, files=len(finished), total_files=len(work.plan.files))

    def poll() -> None:
        if progress:
            progress(read_totals(work, before))

    for stage in stages(work, target, 16 * max(1, workers), plain):
        before = dataclasses.replace(before, stage=stage.name)
        if stage.name == "tokenize" and len(finished) == len(work.plan.files):
            continue
        if stage.name == "pack":
            stage = dataclasses.replace(stage, tasks=min(stage.tasks, len(work.shards())))
        if workers == 0 or (stage.tasks == 1 and stage.name != "tokenize"):
            run_here(stage)
            poll() if stage.name != "publish" else None
        else:
            ProcessesExecutor(stage, workers, str(work.folder / "logs" / stage.name), poll).run()
    if progress:
        progress(dataclasses.replace(before, stage="done", read_bytes=total, files=len(work.plan.files)))


# -- Clusters ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ClusterOptions:
    """How a cluster runs the tasks. time: Slurm's limit for a task. sbatch: further `--key=value` for sbatch."""

    tasks: int = 256
    workers: int | None = None
    partition: str | None = None
    time: str = "24:00:00"
    memory_gb: int = 2
    sbatch: tuple[str, ...] = ()


def submit_slurm(work: Work, target: Path, options: ClusterOptions, plain: bool) -> list[str]:
    """Submit every stage as a Slurm job array that waits for the one before. Returns the job ids."""
    import shutil

    from datatrove.executor.slurm import SlurmPipelineExecutor
    from datatrove.utils.logging import logger

    if shutil.which("sbatch") is None:
        raise UserError("--executor slurm: sbatch is not on PATH", fix="run this on a login node of the cluster")
    if options.partition is None:
        raise UserError("--executor slurm needs a partition", fix="give --partition (see sinfo)")
    extra: dict[str, str] = {}
    for setting in options.sbatch:
        key, equals, value = setting.removeprefix("--").partition("=")
        if not key or not equals:
            raise UserError(f"--sbatch {setting}", fix="write --sbatch key=value")
        extra[key] = value
    logger.remove()  # its log lines would stand between ours; the jobs write their own
    logs = target.with_name(f"{target.name}.logs") / time.strftime("%Y%m%d-%H%M%S")
    jobs: list[str] = []
    for stage in stages(work, target, options.tasks, plain):
        executor = SlurmPipelineExecutor(
            pipeline=stage.steps,
            tasks=stage.tasks,
            time=options.time,
            partition=options.partition,
            workers=options.workers or -1,
            mem_per_cpu_gb=options.memory_gb,
            job_name=f"tinyllama-{stage.name}",
            qos=None,
            env_command=f'export PATH="{Path(sys.executable).parent}:$PATH"',
            sbatch_args=extra,
            depends_job_id=jobs[-1] if jobs else None,
            logging_dir=str(logs.resolve() / stage.name),
            skip_completed=False,
        )
        executor.run()
        jobs.append(str(executor.job_id))
    return jobs


def run_ray(work: Work, target: Path, options: ClusterOptions, plain: bool) -> None:
    """Every stage on a Ray cluster: the one this process is connected to, else RAY_ADDRESS, else a local one."""
    try:
        import ray
    except ImportError:
        raise MissingExtraError("ray", "ray") from None
    from datatrove.executor.ray import RayPipelineExecutor
    from datatrove.utils.logging import logger

    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level="ERROR")
    logger.remove()
    logs = target.with_name(f"{target.name}.logs") / time.strftime("%Y%m%d-%H%M%S")
    for stage in stages(work, target, options.tasks, plain):
        executor: PipelineExecutor = RayPipelineExecutor(
            pipeline=stage.steps,
            tasks=stage.tasks,
            workers=options.workers or -1,
            mem_per_cpu_gb=options.memory_gb,
            logging_dir=str(logs.resolve() / stage.name),
            skip_completed=False,
        )
        executor.run()
    if not (target / "manifest.json").exists():
        raise DataError("the Ray tasks did not finish the store", fix=f"see {logs}, then run the same command again")
