"""vLLM's own OpenAI-compatible server as a child, watched and ended cleanly: for `--listen`, and to measure it.

The server gets a session of its own, so that Ctrl-C reaches only us: we ask it to stop, let it finish what it is doing,
and make sure that none of its processes is left. The API key goes through the environment, not the command line, which
every user of the machine can read.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import http.client
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from serve import engine as door
from serve import identity
from tinyllama import processes
from tinyllama.errors import ConfigError, UserError

if TYPE_CHECKING:
    from rich.console import Console

    from serve.source import Source

STOP_TIMEOUT_S = 30
MODULE = "vllm.entrypoints.openai.api_server"


def parse_address(text: str) -> tuple[str, int]:
    """`HOST:PORT`, `[V6]:PORT`, `:PORT` or `PORT` (loopback), with port 0 for any free one. ConfigError if unusable."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") or "127.0.0.1"
    if not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ConfigError(f"--listen {text}", fix="give HOST:PORT, such as 127.0.0.1:8000")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except (OSError, TypeError, ValueError) as error:  # the last two: of a name that cannot be encoded
            if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
                fix = "choose another, or 0 for a free one"
                raise ConfigError(f"--listen {text}: port {port} is in use", fix=fix) from None
            reason = error.strerror if isinstance(error, OSError) else "no name of a machine"
            raise ConfigError(f"--listen {text}: {reason}", fix="give an address of this machine") from None
        return host, probe.getsockname()[1]


def command(config: door.EngineConfig, name: str, host: str, port: int) -> list[str]:
    """The command line of vLLM's server."""
    line = [sys.executable, "-m", MODULE, "--host", host, "--port", str(port), "--served-model-name", name]
    line += ["--middleware", f"{identity.Identified.__module__}.{identity.Identified.__name__}"]
    for option, value in config.arguments().items():
        flag = f"--{option.replace('_', '-')}"
        text = json.dumps(value) if isinstance(value, dict) else str(value)
        line += ([flag] if value else []) if isinstance(value, bool) else [flag, text]
    return line


def listen(
    source: Source,
    config: door.EngineConfig,
    address: tuple[str, int],
    api_key: str | None,
    log: Path,
    console: Console,
) -> int:
    """Serve until SIGINT, SIGTERM or SIGHUP; returns 0. UserError if the server does not come up, or dies later.

    Needs `engine.importable_vllm` around it.
    """
    from rich.markup import escape

    host, port = address
    shown = "127.0.0.1" if host == "0.0.0.0" else "::1" if host == "::" else host
    url = f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"
    if not api_key and not _is_loopback(host):
        console.print(f"[yellow]anyone who can reach {host}:{port} can use this model[/]; set --api-key")
    secret = secrets.token_hex(16)
    environment = {**os.environ, identity.VARIABLE: secret, **({"VLLM_API_KEY": api_key} if api_key else {})}
    with _stop_signals() as stopping, launched(command(config, source.name, host, port), log, environment) as process:
        started = time.monotonic()
        with console.status("starting vLLM's server (about a minute)"):
            while not healthy(shown, port, secret) and process.poll() is None and not stopping:
                time.sleep(0.25)
        if process.poll() is None and not stopping:
            waited = time.monotonic() - started
            console.print(f"[green]serving[/] {escape(source.name)} at {url}/v1 after {waited:.0f} s", soft_wrap=True)
            console.print(f"health: {url}/health, log: {log}; Ctrl-C stops it", soft_wrap=True, markup=False)
        while process.poll() is None and not stopping:
            time.sleep(0.1)
        died = process.poll() is not None and not stopping
    if died:
        raise ended(log)
    console.print("stopped")
    return 0


@contextlib.contextmanager
def launched(line: list[str], log: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """The server as a child in a session of its own, all its output in `log`; ended, with its children, at the end.

    All of them end too if this process is killed: engine and worker would keep their memory, and the server its port.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as stream, processes.guarded(environment) as guarded:
        process = subprocess.Popen(
            line, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env=guarded, start_new_session=True
        )
        try:
            yield process
        finally:
            _stop(process)


class Private(NamedTuple):
    """A server for this process alone, that has answered."""

    process: subprocess.Popen[bytes]
    host: str
    port: int
    secret: str

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def healthy(self) -> bool:
        """Whether it is up; not whether anything answers there."""
        return healthy(self.host, self.port, self.secret)


@contextlib.contextmanager
def private(config: door.EngineConfig, name: str, log: Path) -> Iterator[Private]:
    """A server for this process alone, on a free port of the loopback interface, once it answers.

    Without a cache of prefixes (random prompts share none), a line of log for each request, and the model's own sampling
    settings (which would cost time that the offline batches do not pay). UserError, with the reason from its log, if it
    does not come up.
    """
    host, port = parse_address("127.0.0.1:0")
    secret = secrets.token_hex(16)
    environment = {key: value for key, value in os.environ.items() if key != "VLLM_API_KEY"}
    environment[identity.VARIABLE] = secret
    line = [*command(config, name, host, port), "--no-enable-prefix-caching", "--disable-uvicorn-access-log"]
    line += ["--generation-config", "vllm"]
    with launched(line, log, environment) as process:
        server = Private(process, host, port, secret)
        while not server.healthy():
            if process.poll() is not None:
                raise ended(log)
            time.sleep(0.25)
        yield server


def ended(log: Path) -> UserError:
    """The error for a server that is gone though nobody asked it to stop."""
    reason = door.logged_reason(log) or "it logged no error"
    return UserError(f"vLLM's server ended by itself: {reason}", fix=f"its whole log is in {log}")


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def healthy(host: str, port: int, secret: str) -> bool:
    """Whether the server that was started with this secret says that it is up; another one on its port does not count."""
    connection = http.client.HTTPConnection(host, port, timeout=2)
    try:
        connection.request("GET", identity.PATH)
        answer = connection.getresponse()
        return answer.status == 200 and hmac.compare_digest(
            (answer.getheader(identity.HEADER) or "").encode(), secret.encode()
        )
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """The list that is yielded is empty until a signal asks us to stop."""
    received: list[int] = []

    def note(signum: int, _: Any) -> None:
        received.append(signum)

    wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.signal(number, note) for number in wanted}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the server to end, wait for it, then end it. The guardian ends what is left of its family, in the right order."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
    process.kill()
    if not processes.LINUX:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
