"""Assembles `tinyllama`, and gives exit codes their meaning: 0 success, 2 a user's mistake in one red line, 1 a failure.

The commands of `train`, `evalsuite` and `serve` are named here as text and imported when the program starts; the core
imports no package that builds on it. None of their command modules imports anything heavy.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, TextIO

from tinyllama import __version__
from tinyllama.errors import DISK_FULL, MissingExtraError, UserError, send_nowhere

if TYPE_CHECKING:
    import typer

INTERRUPTED = 130  # exit code after Ctrl-C, as of shells; after another signal 128 and its number
CLEAN_UP_S = 30.0  # for a command to end in order after a signal: as long as Slurm and Kubernetes give
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)  # the last one stops `train` alone
AGAIN = 75  # of `train`, whatever stopped it: run the same command again
SHOWN_CHARACTERS = 1500  # of each end of a message that is longer than two of these

COMMANDS = {
    "train": ("train.cli", "train_command"),
    "export": ("tinyllama.cli.export", "export_command"),
    "eval": ("evalsuite.cli", "eval_command"),
    "compare": ("tinyllama.cli.compare", "compare_command"),
    "serve": ("serve.cli", "serve_command"),
    "plan": ("tinyllama.cli.plan", "plan_command"),
    "report": ("tinyllama.cli.report", "report_command"),
    "demo": ("tinyllama.cli.demo", "demo_command"),
}
GROUPS = {
    "tokenizer": ("tinyllama.tokenizer.cli", "app", "Train a tokenizer; export it for Hugging Face."),
    "data": ("tinyllama.cli.data", "app", "Tokenize text into stores that can be verified; look into them."),
    "eval-data": ("evalsuite.data_cli", "app", "Bundles of benchmark data for evaluations without a network."),
}
# What a missing package is part of; import names.
EXTRAS = {
    "data": ("numpy", "sentencepiece", "pyarrow", "zstandard", "orjson", "fsspec", "datatrove"),
    "model": ("torch", "safetensors", "transformers", "tokenizers", "compressed_tensors"),
    "train": ("deepspeed", "psutil"),
    "eval": ("lm_eval",),
    "serve": ("vllm", "openai", "scipy"),
    "report": ("matplotlib",),
}
EXAMPLES = """[bold]From text to tokens per second[/]

  tinyllama demo                                              everything below, small, in minutes
  tinyllama tokenizer train corpus/ --output tokenizer.model --vocab-size 32000
  tinyllama data prepare corpus/*.jsonl --output data/prose --tokenizer tokenizer.model
  tinyllama train --recipe tinyllama_1.1b --data data --output runs/1b
  tinyllama export runs/1b --output exports/1b
  tinyllama eval --model exports/1b --tasks commonsense
  tinyllama serve exports/1b
  tinyllama plan --loss-of 1.1e9 --inference-tokens 2e12
  tinyllama report runs/1b eval/1b bench/1b"""


def _version(wanted: bool) -> None:
    import typer

    if wanted:
        typer.echo(f"tinyllama {__version__}")
        raise typer.Exit


def build(wanted: str | None = None) -> typer.Typer:
    """The whole command line, or the part that the command `wanted` needs: the others' modules cost a tenth of a second."""
    import typer

    app = typer.Typer(
        name="tinyllama",
        help="Pretrain a ~1B Llama on far more tokens than compute-optimal, prove what it can do, know what it costs.",
        epilog=EXAMPLES.replace("\n", "\n\n"),
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_show_locals=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def root(
        version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
    ) -> None:
        pass

    known = wanted in COMMANDS or wanted in GROUPS
    for name, (module, attribute) in COMMANDS.items():
        if known and name != wanted:
            continue
        command = getattr(importlib.import_module(module), attribute)
        app.command(name, **getattr(command, "typer_settings", {}))(command)
    for name, (module, attribute, text) in GROUPS.items():
        if known and name != wanted:
            continue
        group = getattr(importlib.import_module(module), attribute)
        app.add_typer(group, name=name, help=text, no_args_is_help=True)
    return app


def print_error(text: str) -> None:
    """One red line on standard error, if it can be written: a log may lie on a disk that is full. The exit code stands."""
    import contextlib

    from rich.console import Console
    from rich.text import Text

    if len(text) > 2 * SHOWN_CHARACTERS:  # a value that is a file's whole content, say; its fix stands at the end
        text = f"{text[:SHOWN_CHARACTERS]} ... {text[-SHOWN_CHARACTERS:]}"
    # What a terminal would obey, or a file cannot hold, is shown as Python writes it.
    text = "".join(c if c.isprintable() else " " if c == "\n" else repr(c)[1:-1] for c in text)
    line = Text.assemble(("error: ", "bold red"), (text, "red"))
    with contextlib.suppress(OSError):
        Console(stderr=True, soft_wrap=True).print(line)


def _stop_in_order(train: bool) -> list[int]:
    """Have SIGTERM, and the end of the terminal, unwind the stack as Ctrl-C does; the first one's number is in the list.

    train: leave at once instead, with the exit code that has a supervisor start the command again. Nothing is to be saved
    until it has launched its ranks, and takes the signals over. A library can swallow what is raised in the middle of it:
    who is still here after CLEAN_UP_S is ended.
    """
    received: list[int] = []

    def stop(number: int, _: object) -> None:
        received.append(number)
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)  # a second one would meet the clean-up of the first
        if not train:
            end = threading.Timer(CLEAN_UP_S, _end, (number,))
            end.daemon = True
            end.start()
            raise KeyboardInterrupt
        print_error("stopped by a signal before the first step; run the same command again")
        if locks := sys.modules.get("tinyllama.locks"):
            locks.give_back_all()
        os._exit(AGAIN)

    wanted = STOPPING if train else STOPPING[:-1]
    ignored = {
        number for number in wanted if signal.getsignal(number) is signal.SIG_IGN
    }  # by nohup, or by a script's `&`
    numbers = [number for number in wanted if number not in ignored or (train and number != signal.SIGHUP)]
    for number in numbers:
        signal.signal(number, stop)
    return received


def _end(number: int) -> None:
    print_error(f"interrupted, and not ended {CLEAN_UP_S:g} s later: ended now; run the same command again to continue")
    if locks := sys.modules.get("tinyllama.locks"):
        locks.give_back_all()
    os._exit(128 + number)


def _interrupted(received: list[int]) -> None:
    print_error("interrupted; what was finished is kept, run the same command again to continue")
    sys.exit(128 + received[0] if received else INTERRUPTED)


def main() -> None:
    """Entry point of the `tinyllama` script: runs the command, and ends with its exit code once what it said is written."""
    code: int | str | None = None
    try:
        _run()
    except SystemExit as end:
        code = end.code
    error = _written(sys.stdout)
    if error is not None and not code:  # the code of what failed before stands
        code = 1 if isinstance(error, BrokenPipeError) else _no_room(error)
    _written(sys.stderr)  # what cannot be told changes no code
    sys.exit(code)


def _written(stream: TextIO | None) -> OSError | None:
    """Write out what a stream still holds; what it cannot write is dropped, so that Python's own try has no error."""
    if stream is None or stream.closed:  # as by >&-
        return None
    try:
        stream.flush()
    except OSError as error:
        send_nowhere(stream)
        return error
    return None


def _no_room(error: OSError) -> int:
    print_error(f"writing the output failed ({error.strerror}); free space, or send it elsewhere")
    return 2


def _run() -> None:
    train = sys.argv[1:2] == ["train"] and "--dry-run" not in sys.argv
    before = {number: signal.getsignal(number) for number in STOPPING}
    received = _stop_in_order(train)
    try:
        if "" in sys.argv[1:]:  # as a path it would be the folder we are in
            raise UserError("an argument is empty", fix="is a variable unset? give a value, or leave the option out")
        build(sys.argv[1] if sys.argv[1:] else None)()
    except UserError as error:
        print_error(str(error))
        sys.exit(2)
    except ModuleNotFoundError as error:
        for extra, names in EXTRAS.items():
            if (error.name or "").partition(".")[0] in names:
                print_error(str(MissingExtraError(str(error.name), extra)))
                sys.exit(2)
        raise
    except KeyboardInterrupt:
        _interrupted(received)
    except SystemExit as end:
        if end.code != INTERRUPTED:
            raise
        _interrupted(received)  # typer has made an exit of the interrupt
    except BrokenPipeError:
        sys.exit(1)  # the reader (`head`, say) has gone: nothing to tell anybody
    except OSError as error:
        if error.filename is not None or error.errno not in DISK_FULL:
            raise
        sys.exit(_no_room(error))  # of a standard stream: commands name the files that they write
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if train else handler)  # the exit code of a run stands
