"""SentencePiece's trainer in a process of its own, which ends with the one that asked for it.

While it learns it keeps Python's lock, so that no signal would be heard in its process. Here only the waiting is ours:
Ctrl-C ends it at once. `learn` is called; run as a program, this file is the other side: settings as a line of JSON and
lines of text come in, the model (or what is wrong) goes out.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

MODEL, REFUSED = b"M", b"E"


class LearnerError(Exception):
    """SentencePiece's own complaint, or how its process ended."""


def learn(lines: Iterable[bytes], settings: dict[str, Any]) -> bytes:
    """The model that SentencePiece learns from lines of UTF-8. LearnerError if it cannot. Nothing outlives this call."""
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "tinyllama.tokenizer.learner", str(os.getpid())]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            try:
                process.stdin.write(json.dumps(settings).encode() + b"\n")
                for line in lines:
                    process.stdin.write(line + b"\n")
                process.stdin.close()
            except BrokenPipeError:
                pass  # it has ended: how is seen below
            answer = process.stdout.read()
            code = process.wait()
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        if code == 0 and answer[:1] == MODEL:
            return answer[1:]
        if code == 0 and answer[:1] == REFUSED:
            raise LearnerError(answer[1:].decode())
        log.seek(0)
        said = log.read().decode(errors="replace").strip().splitlines()
    if code == -signal.SIGKILL:
        raise LearnerError("its process was killed, by the system if memory ran out")
    raise LearnerError(f"its process ended with {code}{f': {said[-1]}' if said else ''}")


def _serve(source: IO[bytes], sink: IO[bytes]) -> None:
    import io

    import sentencepiece

    settings = json.loads(source.readline())

    def lines() -> Iterator[bytes]:
        for line in source:
            yield line[:-1]

    model = io.BytesIO()
    try:
        trainer: Any = sentencepiece.SentencePieceTrainer
        trainer.train(sentence_iterator=lines(), model_writer=model, minloglevel=2, **settings)
        answer = MODEL + model.getvalue()
    except (RuntimeError, ValueError) as error:
        answer = REFUSED + f"{type(error).__name__}: {error}".encode()
    sink.write(answer)
    sink.flush()


def main() -> None:
    """The other side of `learn`. Its parent's id is the argument."""
    from tinyllama.processes import die_with_parent

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends this process
    die_with_parent(int(sys.argv[1]))
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the library prints is not the answer
    _serve(sys.stdin.buffer, sink)


if __name__ == "__main__":
    main()
