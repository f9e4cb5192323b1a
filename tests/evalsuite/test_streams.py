"""Generation in two streams, each on its half of the cores: the same texts, one error, torch's threads as they were."""

from __future__ import annotations

import threading
import time

import eval_calls
import pytest
import torch

from evalsuite import engines
from evalsuite.budget import Budget
from evalsuite.cohorts import Prompt
from evalsuite.engines import Local
from tinyllama.model.llama import Llama

EOS = 2


@pytest.fixture(autouse=True)
def _two_threads(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(engines, "STREAM_PROMPTS", 4)
    monkeypatch.setattr(engines, "WATCHED_S", 0.01)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> Llama:
    return eval_calls.tiny_llama(8, vocab_size=40)


def prompts(count: int, most: int = 24) -> list[Prompt]:
    generator = torch.Generator().manual_seed(5)
    shared = torch.randint(3, 40, (40,), generator=generator).tolist()
    found = []
    for number in range(count):
        own = torch.randint(3, 40, (3 + number % 5,), generator=generator).tolist()
        temperature = 0.0 if number % 3 else 0.8
        found.append(Prompt(shared[: 40 - 20 * (number % 2)] + own, most, (), temperature, seed=number))
    return found


def local(model: Llama, rows: int = 8) -> Local:
    return Local(model, Budget(256, rows), EOS, lambda rows: ["".join(chr(65 + t) for t in row) for row in rows])


def test_texts_are_those_of_one_stream(model, monkeypatch):
    streams, seen = local(model), []
    streams.on_progress = lambda part: seen.append((part, threading.current_thread()))
    found = streams.extend(prompts(21))
    assert {thread for _, thread in seen} == {threading.main_thread()}
    assert seen[-1][0] == 1.0
    assert [part for part, _ in seen] == sorted(part for part, _ in seen)
    monkeypatch.setattr(engines, "STREAMS", 99)
    alone = local(model)
    assert alone.extend(prompts(21)) == found
    assert streams.work.generated > 0
    assert streams.work.alone == alone.work.alone
    # In a thread that begins now, too.
    threads: list[int] = []
    thread = threading.Thread(target=lambda: threads.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert [torch.get_num_threads(), *threads] == [2, 2]


def test_each_stream_has_its_share_of_the_cores_and_rows(model, monkeypatch):
    seen = []
    run = engines.Generation.run

    def watched(generation, budget, work, report):
        seen.append((threading.current_thread().name, torch.get_num_threads(), budget.rows))
        return run(generation, budget, work, report)

    monkeypatch.setattr(engines.Generation, "run", watched)
    local(model).extend(prompts(8))
    assert len({name for name, _, _ in seen}) == 2
    assert [(threads, rows) for _, threads, rows in seen] == [(1, 4), (1, 4)]
    seen.clear()
    local(model).extend(prompts(7))  # too few for two
    local(model).extend(prompts(1) * 8)  # equal prompts are not cut apart
    monkeypatch.setattr(engines, "STREAM_WEIGHTS", 1000)  # too large a model
    local(model).extend(prompts(8))
    assert [(threads, rows) for _, threads, rows in seen] == [(2, 8)] * 3


def test_an_interrupt_does_not_wait_for_the_prompts_to_be_read(model):
    """Prompts that end at their first token: all of the time goes into passes, none into steps."""
    engine = Local(model, Budget(128, 8), EOS, lambda rows: ["" for _ in rows])
    generator = torch.Generator().manual_seed(7)
    many = [Prompt(torch.randint(3, 40, (120,), generator=generator).tolist(), 1, ()) for _ in range(150)]

    told = threading.Event()

    def interrupted(_):
        told.set()
        raise KeyboardInterrupt

    passes = []
    take = engines.Generation._take

    def held(*args):
        passes.append(args)
        if engine.on_progress is interrupted:
            told.wait()  # in its first pass, until there is the interrupt
            time.sleep(0.02)
        take(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines.Generation, "_take", held)
        engine.extend(many)
        whole = len(passes)
        passes.clear()
        engine.on_progress = interrupted
        with pytest.raises(KeyboardInterrupt):
            engine.extend(many)
    assert len(passes) < whole / 3


def test_no_prompts_have_no_texts(model):
    assert local(model).extend([]) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_error_ends_both_streams(model, error, monkeypatch):
    engine = local(model)
    raised = threading.Event()

    def fails(_):
        raised.set()
        raise error

    if error is MemoryError:  # in a stream: the call is tried again with half of the budget until there is none
        monkeypatch.setattr(engines.Generation, "_step", lambda *_: fails(0))
        expected = Exception
    else:  # in the thread that watches
        engine.on_progress = fails
        expected = KeyboardInterrupt
    steps, most = [], 100_000
    step = engines.Generation._step
    monkeypatch.setattr(engines.Generation, "_step", lambda *args: (steps.append(1), step(*args)))
    with pytest.raises(expected):
        engine.extend(prompts(8, most=most))
    assert raised.is_set()
    assert len(steps) < most
    assert torch.get_num_threads() == 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("generation")]
