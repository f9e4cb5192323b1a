"""The stages of the day, cheapest and most decisive first, and how much time each may take. Pure arithmetic."""

from __future__ import annotations

import dataclasses

TOTAL_S = 500.0
TINY_FACTOR = 12  # of every limit, where a CPU computes
TABLE_S = 8.0  # of it; kept for ending what still runs, and for the table


@dataclasses.dataclass(frozen=True)
class Part:
    """One process: `python -m <module> <stage> <name>`. least_s: below this it is not begun."""

    name: str
    module: str
    least_s: float


@dataclasses.dataclass(frozen=True)
class Stage:
    """Parts that share a time limit: what one does not use, the next may. shared: each leaves the later ones their least."""

    number: int
    title: str
    limit_s: float
    parts: tuple[Part, ...]
    shared: bool = True


STAGES = (
    Stage(0, "the machine", 30, (Part("install", "", 5), Part("machine", "gpu_day.machine", 10))),
    Stage(1, "kernels", 50, (Part("times", "gpu_day.kernel_times", 15), Part("kernel tests", "gpu_day.gpu_tests", 12))),
    Stage(
        2,
        "the 1.1B step",
        140,
        (Part("plain", "gpu_day.step", 25), Part("zero1", "gpu_day.step", 30), Part("zero3", "gpu_day.step", 30)),
    ),
    Stage(
        3,
        "reproducibility",
        70,
        (Part("default", "gpu_day.reproduce", 25), Part("deterministic", "gpu_day.reproduce", 25)),
    ),
    Stage(4, "tinyllama train, 1.1B", 150, (Part("train", "gpu_day.training", 75),)),
    Stage(5, "native evaluation", 60, (Part("scores", "gpu_day.scores", 25),)),
    Stage(
        6,
        "if time is left",
        0,
        (
            Part("resume", "gpu_day.training", 40),
            Part("fp8", "gpu_day.step", 35),
            Part("other tests", "gpu_day.gpu_tests", 30),
            Part("deepcompile", "gpu_day.step", 40),
        ),
        shared=False,
    ),
)  # fmt: skip


def longer(stage: Stage) -> Stage:
    """A stage for a CPU."""
    return dataclasses.replace(stage, limit_s=stage.limit_s * TINY_FACTOR)


def ends(chosen: tuple[Stage, ...], began: float, total_s: float) -> dict[int, float]:
    """When each stage must be over: the sum of the limits so far, so that time which is saved goes to the next stage.

    The last is given all that is left, and no stage more than the whole.
    """
    found, at = {}, began
    for stage in chosen:
        at += stage.limit_s
        found[stage.number] = min(at, began + total_s - TABLE_S)
    if chosen:
        found[chosen[-1].number] = began + total_s - TABLE_S
    return found


def allowance(stage: Stage, index: int, end: float, now: float) -> tuple[float | None, str]:
    """Seconds that part number `index` of a stage may take from `now` on, or None and why it is skipped.

    A part leaves to those after it in its stage what they need at least, as long as it has enough itself.
    """
    part = stage.parts[index]
    later = sum(other.least_s for other in stage.parts[index + 1 :]) if stage.shared else 0.0
    room = end - now
    if room < part.least_s:
        return None, f"no time: {max(0.0, room):.0f} s were left, it needs {part.least_s:.0f}"
    return max(part.least_s, room - later), ""


# Before a stage that is run alone where nothing is installed yet.
INSTALL = dataclasses.replace(STAGES[0], parts=STAGES[0].parts[:1])
