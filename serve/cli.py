"""`tinyllama serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def serve_command(
    model: Annotated[str, typer.Argument(help="Export, Hugging Face directory, training checkpoint or run, or hub id.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where bench.json goes.")] = None,
    batch_sizes: Annotated[str, typer.Option(help="Numbers of requests at once, with commas.")] = "1,8,32",
    input_tokens: Annotated[int, typer.Option(help="Prompt length.")] = 64,
    output_tokens: Annotated[int, typer.Option(help="Generated length.")] = 64,
    repeats: Annotated[int, typer.Option(help="Measured runs of each batch size.")] = 3,
    latency_requests: Annotated[int, typer.Option(help="Requests, one at a time, for the latencies.")] = 10,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    max_model_len: Annotated[int | None, typer.Option(help="Context in tokens.")] = None,
    kv_cache_gib: Annotated[int, typer.Option(help="Key-value cache on the CPU.")] = 2,
    eager: Annotated[
        bool | None, typer.Option("--eager/--compiled", help="Skip vLLM's compilation; default on the CPU.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random prompts.")] = 0,
    listen: Annotated[str | None, typer.Option(help="HOST:PORT: keep the OpenAI-compatible API up instead.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="TINYLLAMA_API_KEY", help="Ask clients for this key.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print bench.json instead of the tables.")] = False,
) -> None:
    """Measure a model on vLLM: offline throughput over batch sizes, and latency. Or keep it up behind an API.

    [bold]Examples[/]

      tinyllama serve exports/1b --output bench/1b

      tinyllama serve exports/1b --batch-sizes 1,16,100 --input-tokens 512 --output-tokens 128 --compiled

      tinyllama serve exports/1b --listen 127.0.0.1:8000 --api-key secret
    """
    import json
    import sys

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from serve import bench, table
    from serve.engine import require
    from serve.listen import listen as run_server
    from serve.listen import parse_address
    from serve.model import resolve
    from tinyllama.errors import UserError

    try:
        sizes = tuple(int(part) for part in batch_sizes.split(","))
    except ValueError:
        raise UserError(f"--batch-sizes {batch_sizes}", fix="give numbers with commas, such as 1,8,32") from None
    address = parse_address(listen) if listen else None
    console = Console(stderr=True, highlight=False)
    require()
    path = resolve(model, console.print)
    import torch

    in_eager = eager if eager is not None else not torch.cuda.is_available()
    if address:
        console.print(f"http://{address[0]}:{address[1]}/v1 as soon as the model is loaded; Ctrl-C stops")
        name = Path(model).name
        sys.exit(
            run_server(
                path, address, name=name, dtype=dtype, max_model_len=max_model_len, kv_cache_gib=kv_cache_gib,
                eager=in_eager, api_key=api_key,
            )  # fmt: skip
        )
    settings = bench.BenchSettings(
        sizes, input_tokens, output_tokens, repeats, latency_requests, dtype, max_model_len, kv_cache_gib, in_eager, seed
    )
    target = output or Path("bench") / Path(model).name
    columns = (TextColumn("[bold]serve"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), "ETA",
               TimeRemainingColumn())  # fmt: skip
    # vLLM's output goes to a file through the descriptors; the console writes to copies of them.
    import os

    stream = os.fdopen(os.dup(2), "w")
    with Progress(*columns, console=Console(file=stream, highlight=False)) as progress:
        bar = progress.add_task("starting", total=None)

        def report(what: str, done: int, of: int) -> None:
            progress.update(bar, description=what, completed=done, total=of)

        found = bench.run(path, target, settings, report)
    (target / "table.md").write_text(table.markdown(found))
    if as_json:
        print(json.dumps(found, indent=2))
        return
    out = Console(highlight=False)
    table.print_throughput(found, out)
    out.print(f"raw samples: {target / 'bench.json'}, vLLM's log: {target / 'vllm.log'}")
