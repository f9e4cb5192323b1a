"""Quality against the price of a million output tokens: measured where there is a bench.json and a price, else derived.

Derived means by parameters alone: from a measured model's speed on the same device, scaled as 2 N FLOPs per token says, or
without one from the planner's utilisation of the device's peak. Derived points are hollow, and the caption says which rule.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Iterable
from typing import Any

from tinyllama import hardware, units
from tinyllama.planner.cost import OUTPUT_MFU, Costs, dollars_per_million_tokens
from tinyllama.planner.prices import DEFAULT_DEVICE, Device
from tinyllama.report import evaluation
from tinyllama.report.curves import MARKERS
from tinyllama.report.numbers import dollars, listed, plain
from tinyllama.report.picture import MUTED, Axis, Picture, Section, Series
from tinyllama.report.serving import best, interval

SIZE = re.compile(r"(\d+(?:\.\d+)?)B\b")


@dataclasses.dataclass(frozen=True)
class Speed:
    """Output tokens per second of one device, with its interval, for a model of `params`; what it is."""

    params: float | None
    rate: tuple[float, float | None, float | None]
    device: str
    price: float
    how: str

    def dollars(self, rate: float | None) -> float | None:
        return dollars_per_million_tokens(self.price, rate) if rate and rate > 0 else None


@dataclasses.dataclass(frozen=True)
class Point:
    """A model: dollars with an interval, and a score of evalsuite.scores. run: its number, None for published ones."""

    name: str
    x: tuple[float, float | None, float | None]
    score: Any
    run: int | None
    derived: bool


def find_price(name: str, prices: dict[str, Device]) -> Device | None:
    """The device of the price table that a measured device's name means: NVIDIA A100-SXM4-40GB is A100-40G.

    Devices that a user added to the prices are looked for by the words of their names.
    """
    if gpu := hardware.find(name):
        return prices.get(gpu.name)
    for known, device in prices.items():
        if known not in hardware.NAMES and all(
            re.search(rf"(?<![0-9A-Z]){re.escape(part)}B?(?![0-9A-Z])", name.upper())
            for part in known.upper().split("-")
        ):
            return device
    return None


def output_rate(bench: dict[str, Any]) -> tuple[tuple[float, float | None, float | None], str] | None:
    """Output tokens per second at the best batch size, or those of requests within the objectives where these were set.

    None where nothing was measured.
    """
    online = bench.get("online") or {}
    points = [p for p in online.get("curve", []) if p.get("goodput_rps") and p["goodput_rps"]["mean"]]
    if points:  # the objectives were set, and met
        point = max(points, key=lambda p: p["goodput_rps"]["mean"])
        per_request = point["output_tokens_per_s"]["mean"] / point["requests_per_s"]["mean"]
        mean, low, high = interval(point["goodput_rps"])
        ends = [None if end is None else end * per_request for end in (low, high)]
        return (mean * per_request, ends[0], ends[1]), "goodput within the objectives"
    top = best(bench)
    return (interval(top[0]), top[1]) if top else None


def measured(
    bench: dict[str, Any], prices: dict[str, Device], device: Device | None, price: float | None
) -> Speed | None:
    """A bench.json with a price; None where the device has none."""
    name = bench["device"]["name"]
    found = device or find_price(name, prices)
    reached = output_rate(bench)
    if reached is None or (price is None and found is None):
        return None
    rate, how = reached
    dollars_per_hour = price if price is not None else (found.dollars_per_hour if found else 0.0)
    return Speed(bench["model"].get("num_parameters"), rate, name, dollars_per_hour, how)


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a price follows from a size: from `reference`, a measured model, or from the device's peak."""

    device: Device
    reference: Speed | None

    def dollars(self, params: float) -> float:
        if self.reference and self.reference.params:
            rate = self.reference.rate[0] * self.reference.params / params
            return dollars_per_million_tokens(self.reference.price, rate)
        rate = Costs(self.device, self.device, output_frac=1.0).serving_tokens_per_s(params)
        return dollars_per_million_tokens(self.device.dollars_per_hour, rate)

    @property
    def words(self) -> str:
        if self.reference and self.reference.params:
            return (
                f"Hollow: not measured; the speed that {self.reference.device} reached here, scaled by parameters, at "
                f"{dollars(self.reference.price)} an hour."
            )
        return (
            f"Hollow: not measured; derived for {self.device.name} at {dollars(self.device.dollars_per_hour)} an hour, "
            f"2 FLOPs per parameter and token, {100 * OUTPUT_MFU:g}% of the peak in use while generating "
            "(Sardana et al. 2024)."
        )


def published_points(quality: str, rule: Rule, others: Iterable[Any]) -> list[Point]:
    """The published models of a size in their name, each family and size once, by its most tokens."""
    last: dict[str, Any] = {}
    for model in others:
        base = model.name.split(" ")[0]
        if quality in model.scores and (base not in last or model.tokens > last[base].tokens):
            last[base] = model
    found = []
    for model in last.values():
        size = SIZE.search(model.name)
        if size:
            x = rule.dollars(float(size[1]) * 1e9)
            name = f"{model.name}†" if model.scores[quality].low_confidence else model.name
            found.append(Point(name, (x, None, None), model.scores[quality], None, True))
    return found


def _goodness(point: Point) -> float:
    """Larger is better, whichever way up the score is."""
    return float(point.score.value if point.score.higher_is_better else -point.score.value)


def front(points: list[Point]) -> list[Point]:
    """Those that no other one beats in both price and quality, the cheapest first."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x[0], -_goodness(p))):
        if not kept or _goodness(point) > _goodness(kept[-1]):
            kept.append(point)
    return kept


def comparable(points: list[Point]) -> list[Point]:
    """Those whose scores mean what the published ones do, on the same data; where none is published, what the first does."""
    scores = importlib.import_module("evalsuite.scores")
    first = next((p for p in points if p.run is None), points[0]).score
    return [p for p in points if not (scores.other_sense(p.score, first) or scores.other_data(p.score, first))]


def picture(quality: str, points: list[Point], notes: list[str]) -> Picture:
    """The points and the front of those that can be compared."""
    unit = points[0].score.unit
    factor = units.scale(unit)
    runs, judged = [p for p in points if p.run is not None], comparable(points)
    best_ones, apart = front(judged), [p.name for p in points if p not in judged]
    of = f" (without {', '.join(apart)}, whose scores are not comparable)" if apart else ""
    series = [
        Series(
            f"Pareto front{' of the comparable' if apart else ''}",
            [p.x[0] for p in best_ones],
            [factor * p.score.value for p in best_ones],
            color=MUTED,
            dash=1,
            steps=True,
            names=[p.name for p in best_ones],
        )
    ]
    for place, point in enumerate(sorted(points, key=lambda p: p.run is None)):
        bounds = point.score.interval
        series.append(
            Series(
                point.name,
                [point.x[0]],
                [factor * point.score.value],
                None if bounds is None else [factor * bounds.low],
                None if bounds is None else [factor * bounds.high],
                [point.x[1]],
                [point.x[2]],
                color=MUTED if point.run is None else point.run,
                marker=MARKERS[point.run % len(MARKERS)]
                if point.run is not None
                else evaluation.HOLLOW[place % len(evaluation.HOLLOW)],
                line=False,
                hollow=point.derived,
            )
        )
    told = [f"{p.name} {evaluation.written(p.score)} at {dollars(p.x[0])}" for p in (runs or best_ones)]
    return Picture(
        "pareto",
        f"{evaluation.title(quality)}, against price",
        f"{listed(told, '; ')} per million output tokens. On the front{of}: {', '.join(p.name for p in best_ones)}.",
        Axis("dollars per million output tokens", "dollars", "log"),
        evaluation.axis(unit),
        series,
        notes,
    )


def section(
    quality: str,
    evaluated: list[tuple[str, list[Any]]],
    benches: dict[str, list[dict[str, Any]]],
    params: dict[str, float],
    asked: tuple[dict[str, Device], Device | None, float | None],
) -> Section:
    """asked: the price table, the device of it that was named, dollars per hour. params: of each run, where known."""
    prices, device, price = asked
    speeds, left_out = {}, []
    for name, found in benches.items():
        priced = [speed for bench in found if (speed := measured(bench, prices, device, price))]
        if priced:
            speeds[name] = min(priced, key=lambda s: s.dollars(s.rate[0]) or 0.0)
        elif found and (reached := output_rate(found[0])):
            left_out.append(
                f"{name}: an hour of {found[0]['device']['name']} has no price in the table; give --price-per-hour to place "
                f"its measured {plain(reached[0][0])} output tokens/s."
            )
    reference = next((s for s in speeds.values() if s.params), None)
    rule = Rule(device or prices[DEFAULT_DEVICE], reference)
    points = []
    for label, model, number in evaluation.latest(evaluated, [quality]):
        name, score = evaluated[number][0], model.scores[quality]
        if name in speeds:
            speed = speeds[name]
            mean, low, high = speed.rate
            x = (speed.dollars(mean) or 0.0, speed.dollars(high), speed.dollars(low))
            points.append(Point(label, x, score, number, False))
        elif name in params:
            points.append(Point(label, (rule.dollars(params[name]), None, None), score, number, True))
        else:
            left_out.append(f"{name}: neither its speed nor its number of parameters is known.")
    for name, models in evaluated:
        if not any(quality in model.scores for model in models):
            left_out.append(f"{name}: {quality} was not evaluated.")
    others = evaluation.published()
    published = published_points(quality, rule, others)
    notes = ["Bars: 95% intervals."]
    shown = {
        name: speed
        for name, speed in speeds.items()
        if any(p.run is not None and evaluated[p.run][0] == name and not p.derived for p in points)
    }
    if shown:
        texts = [
            f"{name} {plain(s.rate[0])} ({s.how}) on {s.device} at {dollars(s.price)}" for name, s in shown.items()
        ]
        notes.append(f"Measured output tokens/s, and dollars an hour: {listed(texts, '; ')}.")
    if published or any(p.derived for p in points):
        notes.append(rule.words)
    if not points:
        return Section("price", "Price and quality", [], [], left_out)
    names = {point.name.rstrip("†") for point in published}
    notes += evaluation.conditions(evaluated, quality, [m for m in others if m.name in names])
    return Section("price", "Price and quality", [], [picture(quality, [*points, *published], notes)], left_out)
