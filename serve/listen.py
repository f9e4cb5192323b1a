"""Keeps vLLM's OpenAI-compatible server up until a signal, and stops it with all its processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

from serve.engine import prepare_environment, require
from tinyllama.errors import UserError


def parse_address(text: str) -> tuple[str, int]:
    """HOST:PORT; UserError if it is none, or the port is taken."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"--listen {text}", fix="give HOST:PORT, such as 127.0.0.1:8000")
    host = host.strip("[]") or "127.0.0.1"
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except OSError as error:
            raise UserError(f"--listen {text} ({error.strerror})", fix="give a free port of this machine") from None
    return host, int(port)


def listen(
    model: str, address: tuple[str, int], *, name: str, dtype: str, max_model_len: int | None, kv_cache_gib: int,
    eager: bool, api_key: str | None,
) -> int:  # fmt: skip
    """Run the server until it ends or SIGINT or SIGTERM arrives; returns 0 after a stop by signal."""
    require()
    prepare_environment(kv_cache_gib)
    host, port = address
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", name]
    command += ["--host", host, "--port", str(port), "--dtype", dtype]
    command += ["--max-model-len", str(max_model_len)] if max_model_len else []
    command += ["--enforce-eager"] if eager else []
    environment = dict(os.environ)
    if api_key:
        environment["VLLM_API_KEY"] = api_key  # not on the command line, where every user of the machine could read it
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True
        process.send_signal(signal.SIGTERM)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = _wait(process)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        try:
            os.killpg(process.pid, signal.SIGKILL)  # the engine's workers, should one be left
        except ProcessLookupError:
            pass
    return 0 if stopped else code


def _wait(process: subprocess.Popen[bytes]) -> int:
    while True:
        try:
            return process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            continue
