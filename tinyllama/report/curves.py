"""The pictures of training, over tokens: loss, bits per byte, learning rate, gradient norm, speed, epochs.

One run is coloured by what is shown, several by run. Raw values stand faint behind their mean over the last steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tinyllama import units
from tinyllama.report.metrics import Training
from tinyllama.report.numbers import POINTS, compact, extremes, listed, percent, plain, smooth, spaced
from tinyllama.report.picture import Axis, Marks, Picture, Section, Series

Named = list[tuple[str, Training]]
TOKENS = Axis("tokens", "tokens")
SMOOTHED_PART = 100  # the window is this part of the logged steps
SPAN_OF_LOG = 30  # a positive column that spans more is drawn on a logarithmic axis
MARKS = {"spike": "loss spikes", "restart": "restarts", "save": "saves"}


def section(runs: Named) -> Section:
    """Every picture that the runs' files allow, and a sentence for what they lack."""
    makers: list[tuple[str, Callable[[Named], Picture | None]]] = [
        ("the loss", _loss),
        ("bits per byte of held-out text", _bits_per_byte),
        ("scores during training", _scores),
        ("the learning rate", _rate),
        ("the gradient norm", _norm),
        ("throughput", _throughput),
        ("MFU (no data sheet of the device is known)", _mfu),
        ("epochs", _epochs),
    ]
    pictures, left_out = [], []
    for what, make in makers:
        picture = make(runs)
        if picture:
            pictures.append(picture)
        elif make is not _scores:
            left_out.append(f"No run logged {what}.")
    for name, run in runs:
        if run.broken_lines:
            lines = "line" if run.broken_lines == 1 else "lines"
            left_out.append(f"{name}: {run.broken_lines} {lines} of metrics.jsonl cut short by a kill, left out.")
        if not run.config:
            left_out.append(f"{name}: no config.json; the model, the versions and the hardware are not known.")
    return Section("training", "Training", [], pictures, left_out)


def window(run: Training) -> int:
    """Logged steps in the mean of the smoothed curves."""
    return max(1, len(run.tokens) // SMOOTHED_PART)


def _prefix(runs: Named, name: str, text: str) -> str:
    return text if len(runs) == 1 else f"{name} {text}"


def _listed(values: np.ndarray) -> list[float | None]:
    return [float(v) if np.isfinite(v) else None for v in values]


def _raw_and_smooth(run: Training, column: str, label: str, color: int, factor: float = 1.0) -> list[Series]:
    """The column's raw values, faint, and their running mean; the values alone where there are too few to smooth."""
    values = run.columns[column] * factor
    width = window(run) if len(values) >= SMOOTHED_PART else max(1, len(values) // 10)
    raw = extremes(values)
    if width < 2:
        return [Series(label, run.tokens[raw].tolist(), _listed(values[raw]), color=color, dash=color)]
    mean = smooth(values, width)
    places = spaced(len(values))
    return [
        Series(f"{label}, raw", run.tokens[raw].tolist(), _listed(values[raw]), color=color, faint=True, legend=label),
        Series(label, run.tokens[places].tolist(), _listed(mean[places]), color=color, dash=color),
    ]


def _smoothing(runs: Named) -> str:
    widths = {max(1, len(run.tokens) // (SMOOTHED_PART if len(run.tokens) >= SMOOTHED_PART else 10)) for _, run in runs}
    known = sorted(widths - {1})
    if not known:
        return "Every value as logged."
    text = f"{known[0]}" if len(known) == 1 else f"{known[0]} to {known[-1]}"
    return f"Lines: mean of the last {text} logged steps; behind them, faint, the least and greatest of each stretch."


def _marks(runs: Named, kinds: tuple[str, ...]) -> list[Marks]:
    """Spikes, restarts and saves of the runs, one legend entry for each kind."""
    found = []
    for kind in kinds:
        for name, run in runs:
            events = {"spike": run.spikes, "restart": run.restarts, "save": run.saves}[kind]
            chosen = [events[i] for i in spaced(len(events), POINTS // 4)] if events else []
            if chosen:
                texts = [_prefix(runs, name, _told(kind, event)) for _, event in chosen]
                found.append(Marks(MARKS[kind], kind, [x for x, _ in chosen], texts))
    return found


def _told(kind: str, event: dict[str, Any]) -> str:
    if kind == "spike":
        return f"step {event['step']}: loss {event.get('loss', float('nan')):.3f}, {event.get('action', 'no action')}"
    if kind == "restart":
        return f"started again on {event.get('ranks', '?')} ranks"
    waited = f"the training waited {event.get('save_stall_s', 0):.2f} s"
    return f"step {event['step']}: saved in {event['save_s']:.1f} s, {waited}"


def validation_loss(results: dict[str, Any]) -> float | None:
    """The mean over the targets of all sources."""
    known = [r for r in results.values() if isinstance(r, dict) and r.get("loss") is not None]
    targets = sum(r.get("targets", 1) for r in known)
    return sum(r["loss"] * r.get("targets", 1) for r in known) / targets if targets else None


def _held_out(run: Training) -> list[str]:
    return list(dict.fromkeys(source for _, results in run.validation for source in results))


def _loss(runs: Named) -> Picture | None:
    series: list[Series] = []
    findings = []
    for number, (name, run) in enumerate(runs):
        train = _raw_and_smooth(run, "loss", _prefix(runs, name, "training"), number)
        series += train
        known = [y for y in train[-1].y if y is not None]
        if not known:
            continue
        what, verb = "training loss" if len(train) == 1 else "smoothed training loss", "goes"
        if known[-1] < known[0]:
            verb = "falls"
        text = f"{_prefix(runs, name, what)} {verb} from {known[0]:.3f} to {known[-1]:.3f} nats per token"
        text += f" over {compact(run.tokens[-1])} tokens"
        if run.validation:
            x = [tokens for tokens, _ in run.validation]
            if len(runs) == 1:
                for place, source in enumerate(_held_out(run), 1):
                    y = [results.get(source, {}).get("loss") for _, results in run.validation]
                    label = f"held-out {source}"
                    series.append(Series(label, x, y, color=place, dash=place, marker=MARKERS[place % len(MARKERS)]))
            else:
                y = [validation_loss(results) for _, results in run.validation]
                marker = MARKERS[number % len(MARKERS)]
                series.append(Series(f"{name} held-out", x, y, color=number, dash=number, marker=marker))
            last = validation_loss(run.validation[-1][1])
            text += f"; on held-out text it ends at {last:.3f}" if last is not None else ""
        findings.append(text)
    if not findings:
        return None
    marks = _marks(runs, ("spike", "restart", "save"))
    told = [kind for kind in MARKS if kind != "restart" or all(run.starts for _, run in runs)]
    counts = [_count(sum(len(m.x) for m in marks if m.kind == kind), MARKS[kind]) for kind in told]
    top, notes = _frame(runs), [_smoothing(runs)]
    if top is not None:
        notes.append("The first steps lie above the frame.")
    return Picture(
        "loss",
        "Loss",
        f"{_sentence(runs, findings, '. ')} Marked: {', '.join(counts)}.",
        TOKENS,
        Axis("loss, nats per token", limits=(None, top)),
        series,
        notes,
        marks,
    )


def _frame(runs: Named) -> float | None:
    """Where to cut the axis, so that the fall of the first steps does not press the rest flat; None to show all."""
    lows, tops, highest = [], [], []
    for _, run in runs:
        mean = smooth(run.columns["loss"], window(run))
        later = mean[len(mean) // 50 :]
        if not np.isfinite(later).any():
            return None
        lows.append(float(np.nanmin(later)))
        tops.append(float(np.nanmax(later)))
        highest.append(float(np.nanmax(mean)))
    low, top = min(lows), max(tops)
    return top + 0.1 * (top - low) if max(highest) - low > 1.5 * (top - low) else None


def _count(number: int, plural: str) -> str:
    """`no saves`, `1 restart`, `2 loss spikes`."""
    return f"{number or 'no'} {plural if number != 1 else plural.removesuffix('s')}"


def _sentence(runs: Named, findings: list[str], between: str) -> str:
    """One text; it begins with a capital letter unless that is a run's name."""
    text = f"{listed(findings, between)}."
    return text if len(runs) > 1 else text[:1].upper() + text[1:]


MARKERS = ("o", "s", "^", "D", "v", "P")


def _bits_per_byte(runs: Named) -> Picture | None:
    series, findings = [], []
    for number, (name, run) in enumerate(runs):
        for place, source in enumerate(_held_out(run)):
            points = [(x, r[source].get("bits_per_byte")) for x, r in run.validation if source in r]
            known = [y for _, y in points if y is not None]
            if not known:
                continue
            color = place if len(runs) == 1 else number
            marker = MARKERS[color % len(MARKERS)]
            label = _prefix(runs, name, source)
            series.append(
                Series(label, [x for x, _ in points], [y for _, y in points], color=color, dash=place, marker=marker)
            )
            findings.append(f"{label} {known[-1]:.3f}" + (f" (from {known[0]:.3f})" if len(known) > 1 else ""))
    if not series:
        return None
    return Picture(
        "bits-per-byte",
        "Bits per byte of held-out text",
        f"At the end: {listed(findings, ', ')}.",
        TOKENS,
        Axis("bits per byte"),
        series,
        ["Loss over the bytes of the text, so that tokenizers can be compared. Lower is better."],
    )


def _end(entry: dict[str, Any], factor: float, sign: int) -> float | None:
    """An end of a score's interval: what was logged, else of its standard error; a share stays between 0 and 1."""
    if entry.get("ci95"):
        return float(factor * entry["ci95"]["low" if sign < 0 else "high"])
    if entry.get("stderr") is None:
        return None
    end = entry["value"] + sign * 1.96 * entry["stderr"]
    return float(factor * (min(1.0, max(0.0, end)) if units.of_entry(entry) == units.SHARE else end))


def _scores(runs: Named) -> Picture | None:
    series, findings, left_out = [], [], list[str]()
    every = [entry for _, run in runs for _, scores in run.evaluation for entry in scores.values()]
    if not every:
        return None
    unit = units.SHARE if any(units.of_entry(entry) == units.SHARE for entry in every) else units.of_entry(every[0])
    factor = units.scale(unit)
    for number, (name, run) in enumerate(runs):
        tasks = list(dict.fromkeys(task for _, scores in run.evaluation for task in scores))
        for place, task in enumerate(tasks):
            points = [(x, s[task]) for x, s in run.evaluation if task in s]
            if units.of_entry(points[0][1]) != unit:
                left_out.append(task)
                continue
            values = [factor * entry["value"] for _, entry in points]
            low, high = ([_end(entry, factor, sign) for _, entry in points] for sign in (-1, 1))
            label, color = _prefix(runs, name, task), place if len(runs) == 1 else number
            marker = MARKERS[place % len(MARKERS)]
            x = [tokens for tokens, _ in points]
            series.append(Series(label, x, [*values], low, high, color=color, dash=place, marker=marker))
            findings.append(
                f"{label} {units.text(points[-1][1]['value'], unit, 1)}{'%' if unit == units.SHARE else ''}"
            )
    if not series:
        return None
    return Picture(
        "scores-during-training",
        "Scores of the live model",
        f"At the end: {listed(findings, ', ')}.",
        TOKENS,
        Axis("score", "percent") if unit == units.SHARE else Axis(units.words(unit) or "score"),
        series,
        [
            "lm-eval on the weights in training. Bars: 95% intervals.",
            *([f"Left out, in other units: {', '.join(dict.fromkeys(left_out))}."] if left_out else []),
        ],
    )


def _scale(runs: Named, column: str) -> str:
    values = np.concatenate([run.columns[column] for _, run in runs])
    known = values[np.isfinite(values)]
    return "log" if len(known) and known.min() > 0 and known.max() > SPAN_OF_LOG * known.min() else "linear"


def _column(
    runs: Named, column: str, key: str, title: str, axis: Axis, finding: Callable[[Training], str], **more: Any
) -> Picture | None:
    """A picture of one logged column; more: marks, notes, factor, smoothed."""
    factor, smoothed = more.pop("factor", 1.0), more.pop("smoothed", True)
    series: list[Series] = []
    findings = []
    for number, (name, run) in enumerate(runs):
        if run.final(column) is None:
            continue
        label = name if len(runs) > 1 else title
        if smoothed:
            series += _raw_and_smooth(run, column, label, number, factor)
        else:
            places = extremes(run.columns[column])
            values = _listed(run.columns[column][places] * factor)
            series.append(Series(label, run.tokens[places].tolist(), values, color=number, dash=number))
        findings.append(_prefix(runs, f"{name}:", finding(run)))
    if not series:
        return None
    notes = ([_smoothing(runs)] if smoothed else []) + more.pop("notes", [])
    return Picture(key, title, _sentence(runs, findings, "; "), TOKENS, axis, series, notes, **more)


def _rate(runs: Named) -> Picture | None:
    def finding(run: Training) -> str:
        return f"at most {np.nanmax(run.columns['lr']):.2e}, at the end {run.final('lr'):.2e}"

    return _column(runs, "lr", "learning-rate", "Learning rate", Axis("learning rate"), finding, smoothed=False)


def _norm(runs: Named) -> Picture | None:
    def finding(run: Training) -> str:
        return f"median {plain(run.median('grad_norm') or 0)}, greatest {plain(float(np.nanmax(run.columns['grad_norm'])))}"

    axis = Axis("gradient norm", scale=_scale(runs, "grad_norm"))
    marks = _marks(runs, ("spike",))
    return _column(
        runs, "grad_norm", "gradient-norm", "Gradient norm", axis, finding, marks=marks, notes=["Before clipping."]
    )


def _throughput(runs: Named) -> Picture | None:
    def finding(run: Training) -> str:
        return f"median {plain(run.median('tokens_per_s') or 0)} tokens per second"

    marks = _marks(runs, ("restart", "save"))
    axis = Axis("tokens/s, all ranks", "tokens", limits=(0, None))
    return _column(runs, "tokens_per_s", "throughput", "Training throughput", axis, finding, marks=marks)


def _mfu(runs: Named) -> Picture | None:
    def finding(run: Training) -> str:
        return f"median {percent(100 * (run.median('mfu') or 0))} of the device's peak"

    sources = list(dict.fromkeys(str(run.config.get("peak_flops_source")) for _, run in runs if run.config))
    notes = (
        [f"Model FLOPs, attention included, over the peak. The peak is from: {'; '.join(sources)}."] if sources else []
    )
    axis = Axis("MFU", "percent", limits=(0, None))
    return _column(runs, "mfu", "mfu", "Model FLOPs utilisation", axis, finding, factor=100.0, notes=notes)


def _epochs(runs: Named) -> Picture | None:
    series, findings = [], []
    for number, (name, run) in enumerate(runs):
        for place, (source, values) in enumerate(run.epochs.items()):
            places = spaced(len(values), POINTS // 5)
            color = place if len(runs) == 1 else number
            label = _prefix(runs, name, source)
            x = run.tokens[places].tolist()
            marker = MARKERS[number % len(MARKERS)] if len(runs) > 1 else None
            series.append(Series(label, x, _listed(values[places]), color=color, dash=place, marker=marker))
            findings.append(f"{label} {values[-1]:.2f}")
    if not series:
        return None
    finding = f"Seen at the end: {listed(findings, ', ')} times."
    notes = [
        "How often each source's text has been seen; above about 4, repeating gains little (Muennighoff et al. 2023)."
    ]
    return Picture("epochs", "Epochs of each source", finding, TOKENS, Axis("epochs"), series, notes)
