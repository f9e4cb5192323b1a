"""`tinyllama serve`: measures a model in vLLM, or keeps vLLM's OpenAI-compatible server up."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from serve.beside import Beside
    from serve.job import Job

ONLINE = "Latency under load"


def serve_command(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Export, Hugging Face directory, training checkpoint, run, or hub id.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where bench.json goes. Default: runs/serve/NAME.")
    ] = None,
    batch_sizes: Annotated[str, typer.Option(help="Requests in flight together, comma-separated.")] = "1,8,32",
    input_tokens: Annotated[int, typer.Option(help="Length of every prompt.")] = 64,
    output_tokens: Annotated[int, typer.Option(help="Tokens generated for every prompt.")] = 64,
    lengths: Annotated[
        str | None,
        typer.Option(metavar="PROMPTxOUTPUT,...", help="Several lengths, such as 64x64,512x128."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Sequences generated for each prompt of a batch (vLLM's n).")] = 1,
    preset: Annotated[
        str | None, typer.Option(help="tinyllama-a40: batches of 100 with 10 samples, which TinyLlama published.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Measured runs of each batch, after 2 for warm-up.")] = 5,
    latency_requests: Annotated[int, typer.Option(help="Single requests timed for the latency percentiles.")] = 30,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: as vLLM chooses.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Context in tokens. Default: the model's.")] = None,
    kv_cache_gib: Annotated[
        float | None, typer.Option(help="KV cache. Default: on CPU what the workload needs, on GPU vLLM's.")
    ] = None,
    eager: Annotated[
        bool | None, typer.Option("--eager/--compiled", help="Default: eager on CPU, compiled on GPU.")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Prompts of the batches are windows of this text. Default: random token ids."
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(help="Of the batches' sampling; 0: the most likely token.")] = 1.0,
    draft: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Speculative decoding with a smaller model of the same vocabulary, or ngram."
        ),
    ] = None,
    draft_tokens: Annotated[int, typer.Option(help="With --draft: tokens proposed at a time.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the random prompts and of sampling.")] = 0,
    parts: Annotated[
        str, typer.Option("--measure", help="offline (batches), online (a server under load), or both.")
    ] = "offline,online",
    rates: Annotated[
        str,
        typer.Option(help="Poisson requests per second, comma-separated; inf: all at once.", rich_help_panel=ONLINE),
    ] = "4,16,inf",
    concurrency: Annotated[
        str, typer.Option(help="Requests in flight, each replaced when it ends.", rich_help_panel=ONLINE)
    ] = "1,4,16",
    requests: Annotated[int, typer.Option(help="Requests of each point.", rich_help_panel=ONLINE)] = 24,
    online_repeats: Annotated[int, typer.Option(help="Runs of each point.", rich_help_panel=ONLINE)] = 3,
    max_in_flight: Annotated[
        int | None,
        typer.Option(
            help="At a rate: requests that the client sends at once; others wait in it.", rich_help_panel=ONLINE
        ),
    ] = None,
    slo: Annotated[
        str | None,
        typer.Option(
            metavar="ttft=MS,tpot=MS,e2e=MS", help="Objective that goodput counts by.", rich_help_panel=ONLINE
        ),
    ] = None,
    slo_share: Annotated[
        float, typer.Option(help="Share of the requests that must meet it at the highest rate.", rich_help_panel=ONLINE)
    ] = 0.99,
    find_max_rate: Annotated[
        bool,
        typer.Option("--find-max-rate", help="Bisect for the highest rate that meets --slo.", rich_help_panel=ONLINE),
    ] = False,
    bandwidth_gb_per_s: Annotated[
        float | None, typer.Option(help="The device's memory bandwidth. Default: data sheet; on CPU measured.")
    ] = None,
    peak_tflops: Annotated[
        float | None, typer.Option(help="The device's dense peak. Default: data sheet; on CPU measured.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what the last run finished, even if it was complete.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what was measured of another model.")] = False,
    scores: Annotated[
        str | None, typer.Option(metavar="RESULTS", help="Evaluation of this model, to keep and show beside the speed.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(metavar="BENCH", help="Earlier bench.json to show speed-up and scores against.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of tables.")] = False,
    listen: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Do not measure: serve the OpenAI API there until stopped.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="VLLM_API_KEY", help="With --listen: the key that clients must send.")
    ] = None,
) -> None:
    """Tokens per second, and latency under load, of a model in vLLM; or, with --listen, an OpenAI-compatible server.

    Writes bench.json (raw samples, settings, versions), table.md and vLLM's logs. A training checkpoint is exported first.

    [bold]Examples[/]

      tinyllama serve exports/1b --output bench/1b

      tinyllama serve runs/1b/checkpoints/step-00001000 --batch-sizes 1,64,256 --input-tokens 512 --output-tokens 128

      tinyllama serve exports/1b --rates 1,2,4 --requests 200 --slo ttft=500,tpot=50 --find-max-rate

      tinyllama serve TinyLlama/TinyLlama-1.1B-Chat-v1.0 --json

      tinyllama serve exports/1b-int8 --scores eval/1b-int8 --baseline bench/1b

      tinyllama serve exports/1b --draft exports/100m --draft-tokens 4 --prompts prose.txt --temperature 0

      tinyllama serve exports/1b --listen 127.0.0.1:8000 --api-key secret
    """
    import sys

    from rich.console import Console

    from serve import source as sources
    from serve.engine import require_vllm
    from tinyllama import locks
    from tinyllama.errors import ConfigError

    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ConfigError(f"--dtype {dtype}", fix="give float32, bfloat16 or float16")
    if kv_cache_gib is not None and kv_cache_gib <= 0:
        raise ConfigError(f"--kv-cache-gib {kv_cache_gib}", fix="give a positive number")
    if max_model_len is not None and max_model_len < 1:
        raise ConfigError(f"--max-model-len {max_model_len}", fix="give a positive number")
    from serve.bench import Workload
    from serve.hardware import Limits
    from serve.presets import PRESETS
    from tinyllama.errors import nearest

    limits = Limits(bandwidth_gb_per_s, peak_tflops)
    shapes = parse_lengths(lengths) if lengths else ()
    sizes = parse_sizes(batch_sizes)
    if preset is not None:
        if preset not in PRESETS:
            raise ConfigError(f"--preset {preset}", fix=nearest(preset, list(PRESETS)))
        chosen = PRESETS[preset]
        sizes, samples, shapes = chosen.batch_sizes, chosen.samples_per_prompt, shapes or chosen.lengths
    if shapes:
        input_tokens, output_tokens = shapes[0]
    workload = Workload(
        sizes, input_tokens, output_tokens, repeats, latency_requests, seed, shapes, samples, preset, prompts, temperature
    )  # fmt: skip
    measured = parse_parts(parts)
    online = None
    if "online" in measured:
        online = online_workload(
            workload, rates, concurrency, requests, online_repeats, max_in_flight, slo, slo_share, find_max_rate
        )
    elif slo or find_max_rate:
        raise ConfigError("--slo and --find-max-rate are about latency under load", fix="give --measure online too")
    console = Console(stderr=True, highlight=False)
    address = None
    if listen is not None:
        from serve.server import parse_address

        address = parse_address(listen)
    require_vllm()
    source = sources.resolve(model, console.print)
    loading: dict[str, Any] = {"dtype": dtype, "max_model_len": max_model_len, "eager": eager, "seed": seed}
    loading["kv_cache_gib"] = kv_cache_gib
    loading["draft"] = None
    if draft is not None:
        from serve import speculative

        loading["draft"] = speculative.resolve(draft, draft_tokens, source, console.print)
    from serve.beside import Beside
    from serve.schemes import slow_here

    if (warning := slow_here(source)) is not None:
        console.print(f"[yellow]{warning}[/]", soft_wrap=True)
    beside = Beside.load(scores, baseline, source, workload)
    target = output or Path("runs/serve") / source.name
    context.with_resource(locks.held(locks.inside(target), target, "tinyllama serve"))
    if address is not None:
        sys.exit(_listen(source, address, api_key, loading, max(workload.batch_sizes), target / "vllm.log", console))
    from serve.job import Job, check

    check(workload, online, source, max_model_len)

    def configure(sequences: int, tokens: int) -> Any:
        return engine_config(source, loading, sequences, tokens)

    offline = "offline" in measured
    job = Job(source, target, configure, workload, offline, online, resume, overwrite, limits)
    _measure(job, console, as_json, beside)


def parse_lengths(text: str) -> tuple[tuple[int, int], ...]:
    """`64x64,512x128` as pairs of prompt and output length."""
    from tinyllama.errors import ConfigError

    pairs = []
    for part in text.split(","):
        prompt, _, output = part.strip().partition("x")
        if not (prompt.isascii() and prompt.isdigit() and output.isascii() and output.isdigit()):
            raise ConfigError(f"--lengths {text}", fix="give prompt and output tokens, such as 64x64,512x128")
        pairs.append((int(prompt), int(output)))
    return tuple(pairs)


def parse_parts(text: str) -> tuple[str, ...]:
    """`offline,online` or one of them."""
    from tinyllama.errors import ConfigError

    parts = tuple(part.strip() for part in text.split(","))
    if not set(parts) <= {"offline", "online"} or len(set(parts)) < len(parts):
        raise ConfigError(f"--measure {text}", fix="give offline, online or offline,online")
    return parts


def online_workload(
    workload: Any,
    rates: str,
    concurrency: str,
    requests: int,
    repeats: int,
    max_in_flight: int | None,
    slo: str | None,
    slo_share: float,
    find_max_rate: bool,
) -> Any:
    """The sweep that the options describe, with the lengths and the seed of the offline workload."""
    from serve.online import OnlineWorkload, parse_concurrency, parse_rates
    from serve.slo import parse

    return OnlineWorkload(
        parse_rates(rates), parse_concurrency(concurrency), requests, repeats, workload.input_tokens,
        workload.output_tokens, workload.seed, max_in_flight, parse(slo) if slo else None, slo_share, find_max_rate,
    )  # fmt: skip


def parse_sizes(text: str) -> tuple[int, ...]:
    """`1,8,32` as numbers."""
    from tinyllama.errors import ConfigError

    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--batch-sizes {text}", fix="give numbers separated by commas, such as 1,8,32") from None


def _listen(
    source: Any,
    address: tuple[str, int],
    api_key: str | None,
    loading: dict[str, Any],
    sequences: int,
    log: Path,
    console: Any,
) -> int:
    """Keep the server up; its KV cache on a CPU holds `sequences` of full length."""
    from serve.engine import importable_vllm, vllm_log
    from serve.server import listen

    with importable_vllm():
        length = loading["max_model_len"] or source.max_positions or 2048
        with vllm_log(log):  # what importing vllm prints
            config = engine_config(source, loading, sequences, length)
        if config.kv_cache_bytes:
            console.print(f"KV cache: {config.kv_cache_bytes / 2**20:,.0f} MiB")
        return listen(source, config, address, api_key, log, console)


def _measure(job: Job, console: Any, as_json: bool, beside: Beside) -> None:
    """Measure with a progress bar on standard error; then the tables, or the JSON, on standard output."""
    import json

    from rich.console import Console
    from rich.markup import escape

    from serve.bench import write_bench
    from serve.online import ServerDied
    from serve.online import failure as failed_requests
    from serve.table import load_bench, print_bench
    from tinyllama.cli.app import print_error

    failure = None
    try:
        bench = job.run()
        if "online" in bench and (said := failed_requests(bench["online"])):
            failure = f"{said}; see {job.server_log}"
    except ServerDied as error:
        failure, bench = str(error), load_bench(job.target)
    if beside.scores:
        bench["scores"] = beside.scores
        write_bench(bench, job.target)
    if as_json:
        print(json.dumps(bench, indent=2))
    else:
        print_bench(bench, Console())
        beside.print(bench, Console())
    logs = [str(log) for log in (job.log, job.server_log) if log.exists()]
    files = escape(", ".join([str(job.target / "bench.json"), str(job.target / "table.md"), *logs]))
    if failure:
        console.print(f"[yellow]in part[/]: {files}; the same command again goes on", soft_wrap=True)
        print_error(failure)
        raise typer.Exit(1)
    console.print(f"[green]measured[/]: {files}", soft_wrap=True)


def engine_config(source: Any, loading: dict[str, Any], sequences: int, tokens: int) -> Any:
    """The engine's configuration; on CPU the KV cache is sized here, for `sequences` of `tokens` at once."""
    from serve.bench import GIB, check_kv_cache, cpu_kv_cache_bytes
    from serve.engine import EngineConfig, on_cpu
    from serve.schemes import refuse_what_cannot_run

    dtype, length, given, draft = (loading[name] for name in ("dtype", "max_model_len", "kv_cache_gib", "draft"))
    size = int(given * GIB) if given else None
    on_a_cpu = on_cpu()
    for model in filter(None, (source, draft.source if draft else None)):
        refuse_what_cannot_run(model, dtype, on_a_cpu)
    if size is not None:
        check_kv_cache(source, dtype, length, size)
    elif on_a_cpu:
        tokens += draft.num_tokens if draft else 0  # proposed ones take their place in the cache too
        size = cpu_kv_cache_bytes(source, dtype, length, sequences, tokens)
        if draft and draft.source:
            size += cpu_kv_cache_bytes(draft.source, dtype, length or source.max_positions, sequences, tokens)
    return EngineConfig(source.location, sequences, dtype, length, size, loading["eager"], loading["seed"], draft)
