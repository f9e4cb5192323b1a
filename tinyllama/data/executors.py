"""Who runs the stages of a preparation: this process, the cores of this machine, Slurm, or Ray. All give the same bytes.

Nothing here knows what a stage does. datatrove's own marks of finished tasks are not used: the parts on disk say what
is finished, so that a run on one executor can be continued on another.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from tinyllama.data.defaults import TASK_MEMORY_GB, TASK_TIME, TASKS
from tinyllama.data.durable import read_json, write_json
from tinyllama.data.pipeline import REPORT_SECONDS, Stage, stages
from tinyllama.data.work import Work
from tinyllama.errors import DataError, MissingExtraError, UserError
from tinyllama.processes import die_with_parent

try:
    from datatrove.executor.base import PipelineExecutor
    from datatrove.executor.local import LocalPipelineExecutor
except ImportError:
    raise MissingExtraError("datatrove", "data") from None


@dataclasses.dataclass(frozen=True)
class Totals:
    """How far a preparation is: bytes of input read, of all (of tokens, while packing); and what this run has written."""

    stage: str
    read_bytes: int
    total_bytes: int
    text_bytes: int = 0
    documents: int = 0
    tokens: int = 0
    files: int = 0
    total_files: int = 0


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
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(parent)
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
            now = read_totals(work, before)
            progress(dataclasses.replace(now, read_bytes=work.packed_bytes()) if before.stage == "pack" else now)

    for stage in stages(work, target, 16 * max(1, workers), plain):
        before = dataclasses.replace(before, stage=stage.name)
        if stage.name == "pack":
            before = dataclasses.replace(before, total_bytes=work.total_bytes())
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
        files = len(work.plan.files)
        progress(dataclasses.replace(before, stage="done", read_bytes=total, total_bytes=total, files=files))


# -- Clusters ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ClusterOptions:
    """How a cluster runs the tasks. time: Slurm's limit for a task. sbatch: further `--key=value` for sbatch."""

    tasks: int = TASKS
    workers: int | None = None
    partition: str | None = None
    time: str = TASK_TIME
    memory_gb: int = TASK_MEMORY_GB
    sbatch: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.tasks < 1 or self.memory_gb < 1:
            raise UserError(f"--tasks {self.tasks}, --memory-gb {self.memory_gb}", fix="give numbers above zero")


MAX_ARRAY = 1001  # Slurm's own limit, unless a cluster has another


def refuse_running_jobs(folder: Path) -> None:
    """DataError while Slurm jobs of an earlier call may still write this store."""
    jobs = read_json(folder / "jobs.json")
    if not isinstance(jobs, list) or not jobs:
        return
    jobs = [str(job) for job in jobs]
    remedy = f"wait for them, or end them: scancel {' '.join(jobs)}"
    try:
        found = _slurm("squeue", "--noheader", "--format=%A", f"--jobs={','.join(jobs)}")
    except FileNotFoundError:
        raise DataError(
            f"Slurm jobs {', '.join(jobs)} may be writing {folder}, and squeue is not on PATH",
            fix=f"run this on a login node of the cluster, or remove {folder / 'jobs.json'} if they are gone",
        ) from None
    except subprocess.CalledProcessError as error:
        if "Invalid job id" not in error.stderr:  # what Slurm says of jobs that it has forgotten
            raise DataError(
                f"squeue cannot tell whether jobs {', '.join(jobs)} still write {folder} ({error.stderr.strip()})",
                fix="try again when Slurm answers",
            ) from None
    else:
        if left := sorted(set(found.split())):
            raise DataError(f"Slurm jobs {', '.join(left)} are writing {folder}", fix=remedy)
    (folder / "jobs.json").unlink()


def _slurm(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def submit_slurm(work: Work, target: Path, options: ClusterOptions, plain: bool) -> list[str]:
    """Submit every stage as a Slurm job array that waits for the one before. Returns the job ids."""
    from datatrove.executor.slurm import SlurmPipelineExecutor
    from datatrove.utils.logging import logger

    if shutil.which("sbatch") is None:
        raise UserError("--executor slurm: sbatch is not on PATH", fix="run this on a login node of the cluster")
    if options.partition is None:
        raise UserError("--executor slurm needs a partition", fix="give --partition (see sinfo)")
    if options.tasks > MAX_ARRAY:
        raise UserError(f"--tasks {options.tasks}", fix=f"give at most {MAX_ARRAY}")
    # A stage whose predecessor failed goes from the queue, instead of waiting for ever.
    extra: dict[str, str] = {"kill-on-invalid-dep": "yes"}
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
        try:
            executor.run()
        except subprocess.CalledProcessError:
            if begun := [*jobs, *([str(executor.job_id)] if executor.job_id else [])]:
                _slurm("scancel", *begun)
            raise UserError(
                f"sbatch refused the stage {stage.name} for the reason above",
                fix="check --partition, --time and --sbatch",
            ) from None
        jobs.append(str(executor.job_id))
        write_json(work.folder / "jobs.json", jobs)
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
    if (read_json(target / "prepared.json") or {}).get("plan") != work.plan.key:
        raise DataError("the Ray tasks did not finish the store", fix=f"see {logs}, then run the same command again")
