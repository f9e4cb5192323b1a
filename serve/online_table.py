"""The online part of bench.json as tables: latency under each load, and the highest rate that meets the objective."""

from __future__ import annotations

from typing import Any

from serve.online import label
from serve.slo import Objective
from serve.table import number, with_interval
from tinyllama.sheets import Sheet

NAMES = {
    "ttft_ms": "TTFT",
    "tpot_ms": "TPOT",
    "itl_ms": "ITL",
    "e2e_ms": "whole request",
    "e2e_with_queue_ms": "with client queue",
}
SHOWN = ("p50", "p90", "p95", "p99")


def online_sheets(bench: dict[str, Any], wide: bool) -> list[Sheet]:
    """The tables of the online part, none if there is none. wide: with intervals and every percentile, for a file."""
    online = bench.get("online")
    if not online:
        return []
    sheets = [_loads(bench, online, wide)]
    if wide:
        sheets.append(_percentiles(online))
    if online["max_rate_under_slo"]:
        sheets.append(_max_rate(online))
    return sheets


def _loads(bench: dict[str, Any], online: dict[str, Any], wide: bool) -> Sheet:
    """A row for each load: rates, and the median and 99th percentile of each latency."""
    settings, points = online["settings"], online["points"]
    latencies = [name for name in NAMES if any(entry[name] for entry in online["curve"])]
    if not settings["max_in_flight"]:  # then nothing waits in the client
        latencies = [name for name in latencies if name != "e2e_with_queue_ms"]
    goodput = ["goodput"] if settings["slo"] else []
    rows = []
    for entry in online["curve"]:
        row = [label(entry)]
        names = ("requests_per_s", "output_tokens_per_s", *(["goodput_rps"] if goodput else []))
        row += [with_interval(entry[name]) if wide else number(entry[name]["mean"]) for name in names]
        for name in latencies:
            found = entry[name]
            between = " / " if wide else "\n"
            row.append(f"{number(found['p50']['mean'])}{between}{number(found['p99']['mean'])}" if found else "")
        rows.append(row)
    model, engine = bench["model"], settings["engine"]
    mode = "eager" if engine["eager"] else "compiled"
    title = (
        f"Latency under load of {model['name']}, ms, p50 {'/' if wide else 'over'} p99\n"
        f"vLLM {settings['vllm']}'s server, {engine['dtype']}, {mode}, on {settings['device']['name']}"
    )
    headings = ["load", "req/s", "out tok/s", *goodput, *(NAMES[name] for name in latencies)]
    return Sheet(title, headings, rows, [_note(settings), *_failures(points)])


def _note(settings: dict[str, Any]) -> str:
    warmup = settings.get("warmup") or f"up to {settings['max_warmup_requests']} requests"
    text = (
        f"{settings['requests']} requests a point, {settings['input_tokens']} random prompt tokens and "
        f"{settings['output_tokens']} generated tokens each; means over {settings['repeats']} repeats; {warmup} "
        f"before each point are warm-up, not counted. req/s: Poisson arrivals; "
        "at a time: each request is sent when another has ended, and its wait for that is not in its latency."
    )
    if settings["slo"]:
        text += f" Goodput: requests per second that met {Objective(**settings['slo'])}."
    return text


def _failures(points: list[dict[str, Any]]) -> list[str]:
    """What is missing, and why."""
    notes = []
    failed = sum(point["failed"] or 0 for point in points)
    if failed:
        reason = next(point["error"] for point in points if point["error"])
        notes.append(f"{failed} requests failed and are in no latency: {reason}")
    missing = [point for point in points if point["status"] != "done"]
    if missing:
        notes.append(f"{len(missing)} of {len(points)} points are not finished; the same command again goes on")
    return notes


def _percentiles(online: dict[str, Any]) -> Sheet:
    rows = []
    for entry in online["curve"]:
        for name, title in NAMES.items():
            if entry[name]:
                cells = [with_interval(entry[name][column]) for column in ("mean", *SHOWN)]
                rows.append([label(entry), title, *cells])
    note = "± half the 95% interval of the repeats' own percentiles."
    return Sheet("Latency under load, ms", ["load", "latency", "mean", *SHOWN], rows, [note], text_columns=2)


def _max_rate(online: dict[str, Any]) -> Sheet:
    """The search, and what it found."""
    found, share = online["max_rate_under_slo"], online["settings"]["slo_share"]
    objective = Objective(**found["slo"])
    rows = [
        [number(p["rate_rps"]), f"{100 * p['share_met']:.1f}%", str(p["requests"]), "yes" if p["meets"] else "no"]
        for p in sorted(found["probes"], key=lambda p: p["rate_rps"])
    ]
    if found["rate_rps"] is None:
        text = f"No rate that was tried met {objective} for {share:.1%} of the requests."
    else:
        text = f"Highest rate at which {share:.1%} of the requests met {objective}: {number(found['rate_rps'])} requests/s; "
        text += f"every repeat met it up to {number(found['low'])}" if found["low"] else "at no rate did every repeat"
        text += (
            f", at {number(found['high'])} none did." if found["high"] is not None else ", and no rate failed in all."
        )
        if found["rate_rps"] >= found["ceiling_rps"]:
            text += (
                " That is the throughput with all requests sent at once; more cannot be sustained, so none was tried."
            )
    total = min((p["requests"] for p in found["probes"]), default=0)
    notes = [text]
    if total * (1 - share) < 1:
        notes.append(
            f"With {total} requests at each rate a single miss is more than that share allows; raise --requests."
        )
    return Sheet(
        "Highest rate under the objective", ["requests/s", "met", "requests", "enough"], rows, notes, text_columns=0
    )
