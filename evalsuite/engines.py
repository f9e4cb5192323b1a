"""What scores and continues token ids for the native backend: one model in this process, or copies that share the work.

Copies are processes of their own, a GPU each, or an equal part of the processor's cores. Requests are cut into shares where
little of their beginnings is common. Nothing here knows lm-eval, but that a copy is loaded as `native.NativeLM` loads it.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from multiprocessing import connection
from typing import Any, Protocol, TypeVar

import torch

from evalsuite.budget import Budget, is_out_of_memory
from evalsuite.cohorts import Prompt
from evalsuite.forest import shares
from evalsuite.generation import Generation
from evalsuite.scoring import Continuation, Work, log_likelihoods
from tinyllama.errors import UserError
from tinyllama.model.llama import Llama
from tinyllama.processes import die_with_parent

# A small model's step on a CPU is many short operations, which several cores cannot share well: prompts are continued in two
# streams, each on its half of the cores. A model that fills the caches is better read once for all rows.
STREAMS, STREAM_PROMPTS, STREAM_WEIGHTS = 2, 32, 2**28  # threads; prompts of each, at least; bytes, at most
WATCHED_S = 0.5  # between two looks at the streams

Answers = TypeVar("Answers")
Progress = Callable[[float], None]  # the finished part of the call at hand, 0 to 1


class Engine(Protocol):
    """Scores and continues token ids. work: what was computed so far. on_progress: called on the way."""

    work: Work
    on_progress: Progress

    def score(self, wanted: list[Continuation]) -> list[tuple[float, bool]]:
        """As `scoring.log_likelihoods`."""

    def extend(self, prompts: list[Prompt]) -> list[list[int]]:
        """The tokens made for each prompt."""

    def close(self) -> None:
        """Give back what is held."""


def quiet(_: float) -> None:
    """Progress that nobody watches."""


class _StoppedError(Exception):
    """A stream ends because another failed, or the user stopped the evaluation."""


class Local:
    """One model in this process. decode: token ids of several rows to their texts."""

    def __init__(self, llama: Llama, budget: Budget, eos: int, decode: Callable[[list[list[int]]], list[str]]) -> None:
        self.llama, self.budget, self.eos, self.decode = llama, budget, eos, decode
        self.work = Work()
        self.on_progress: Progress = quiet

    def score(self, wanted: list[Continuation]) -> list[tuple[float, bool]]:
        return self._fitting(lambda work: log_likelihoods(self.llama, wanted, self.budget, work, self.on_progress))

    def extend(self, prompts: list[Prompt]) -> list[list[int]]:
        parts = self._streams(prompts)

        def attempt(work: Work) -> list[list[int]]:
            if len(parts) > 1:
                return self._extend_in_streams(prompts, parts, work)
            return Generation(self.llama, prompts, self.eos, self.decode).run(self.budget, work, self.on_progress)

        return self._fitting(attempt)

    def _streams(self, prompts: list[Prompt]) -> list[list[int]]:
        """The prompts of each stream; one alone for a GPU, a large model, few prompts, or one core."""
        weights = list(self.llama.parameters())
        alone = [list(range(len(prompts)))]
        small = sum(weight.nbytes for weight in weights) <= STREAM_WEIGHTS and weights[0].device.type == "cpu"
        if not small or len(prompts) < STREAMS * STREAM_PROMPTS or torch.get_num_threads() < STREAMS:
            return alone
        parts = shares([prompt.ids for prompt in prompts], STREAMS, [prompt.most for prompt in prompts])
        # Equal prompts are not cut apart: a stream with few of its own would leave its cores idle.
        return parts if min(map(len, parts)) >= STREAM_PROMPTS // 2 else alone

    def _extend_in_streams(self, prompts: list[Prompt], parts: list[list[int]], work: Work) -> list[list[int]]:
        """Each part in a thread of its own, with an equal share of torch's threads and of the budget's rows."""
        threads = torch.get_num_threads()
        answers: list[list[int]] = [[] for _ in prompts]
        works, finished = [Work() for _ in parts], [0.0 for _ in parts]
        stopped = threading.Event()

        def stream(number: int) -> None:
            torch.set_num_threads(max(1, threads // len(parts)))  # of this thread, and of those that begin from now on
            budget = dataclasses.replace(self.budget, rows=max(1, self.budget.rows // len(parts)))

            def report(part: float) -> None:
                finished[number] = part
                if stopped.is_set():
                    raise _StoppedError

            generation = Generation(self.llama, [prompts[index] for index in parts[number]], self.eos, self.decode)
            for index, tokens in zip(parts[number], generation.run(budget, works[number], report), strict=True):
                answers[index] = tokens
            finished[number] = 1.0

        try:
            with ThreadPoolExecutor(len(parts), thread_name_prefix="generation") as pool:
                try:
                    waiting = {pool.submit(stream, number) for number in range(len(parts))}
                    while waiting:
                        done, waiting = wait(waiting, WATCHED_S, FIRST_EXCEPTION)
                        for future in done:
                            future.result()
                        self.on_progress(sum(f * len(p) for f, p in zip(finished, parts, strict=True)) / len(prompts))
                except BaseException:
                    stopped.set()
                    raise
        finally:
            torch.set_num_threads(threads)
        for one in works:
            work.add(one)
        return answers

    def _fitting(self, attempt: Callable[[Work], Answers]) -> Answers:
        """The call's answers; where memory ends outside of a pass (logits, rows' keys and values), with half of the budget.

        Work counts the attempt that succeeded.
        """
        while True:
            work = dataclasses.replace(self.work)
            try:
                found = attempt(work)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self.budget.halve(error)
                continue
            self.work = work
            return found

    def close(self) -> None:
        """Nothing to give back."""


class Copies:
    """Copies of a model in processes of their own. Use `close`, also after an error."""

    def __init__(self, choice: Any, number: int) -> None:
        """choice: a `backends.ModelChoice`. Returns at once; the first call waits for the copies to be loaded."""
        self.work = Work()
        self.on_progress: Progress = quiet
        context = multiprocessing.get_context("spawn")
        self._processes, self._pipes = [], []
        for rank in range(number):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(choice, rank, number, theirs, os.getpid()), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def score(self, wanted: list[Continuation]) -> list[tuple[float, bool]]:
        return self._shared("score", wanted, shares([w.read for w in wanted], len(self._pipes)) if wanted else [])

    def extend(self, prompts: list[Prompt]) -> list[list[int]]:
        if not prompts:
            return []
        parts = shares([p.ids for p in prompts], len(self._pipes), [p.most for p in prompts])
        return self._shared("extend", prompts, parts)

    def _shared(self, what: str, requests: Sequence[Any], parts: list[list[int]]) -> list[Any]:
        """Send each copy its part; gather the answers in the order of the requests."""
        answers: list[Any] = [None] * len(requests)
        finished = dict.fromkeys(range(len(parts)), 0.0)
        waiting = {}
        for rank, part in enumerate(parts):
            if part:
                self._send(rank, (what, [requests[index] for index in part]))
                waiting[self._pipes[rank]] = rank
        while waiting:
            for pipe in connection.wait(list(waiting)):
                rank = waiting[pipe]  # type: ignore[index]
                kind, value = self._receive(rank)
                if kind == "progress":
                    finished[rank] = value
                    self.on_progress(sum(finished[r] * len(parts[r]) for r in finished) / len(requests))
                    continue
                found, work = value
                for index, answer in zip(parts[rank], found, strict=True):
                    answers[index] = answer
                self.work.add(work)
                finished[rank] = 1.0
                del waiting[pipe]  # type: ignore[arg-type]
        return answers

    def _send(self, rank: int, message: Any) -> None:
        try:
            self._pipes[rank].send(message)
        except OSError:
            raise self._died(rank) from None

    def _receive(self, rank: int) -> tuple[str, Any]:
        try:
            kind, value = self._pipes[rank].recv()
        except (EOFError, OSError):
            raise self._died(rank) from None
        if kind == "error":
            raise value
        return kind, value

    def _died(self, rank: int) -> RuntimeError:
        self._processes[rank].join(5)
        code = self._processes[rank].exitcode
        reason = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return RuntimeError(
            f"copy {rank + 1} of {len(self._pipes)} of the model died ({reason}); if memory ended, use fewer copies"
        )

    def close(self) -> None:
        """End the copies, whatever they are doing."""
        for process in self._processes:
            process.terminate()
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.join()
            pipe.close()


def _serve(choice: Any, rank: int, number: int, pipe: connection.Connection, parent: int) -> None:
    """A copy's process: load, then answer until the pipe closes. An error is sent and the next request awaited."""
    die_with_parent(parent)  # in the middle of a pass too
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process answers Ctrl-C
    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())
    else:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // number))
    engine: Any = None
    while True:
        try:
            what, requests = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            if engine is None:
                from evalsuite.native import NativeLM
                from evalsuite.runner import quieten

                quieten()
                engine = NativeLM.load(choice, copies=number).engine
                engine.on_progress = lambda part: pipe.send(("progress", part))
            before = dataclasses.replace(engine.work)
            found = getattr(engine, what)(requests)
            spent = Work(*(getattr(engine.work, f.name) - getattr(before, f.name) for f in dataclasses.fields(Work)))
            pipe.send(("done", (found, spent)))
        except UserError as error:
            pipe.send(("error", error))
        except Exception as error:
            pipe.send(("error", RuntimeError(f"{type(error).__name__} in copy {rank + 1} of the model: {error}")))
