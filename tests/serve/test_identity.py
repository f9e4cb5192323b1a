"""Our server is told from any other on its port by the secret that it was started with."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Iterator

import pytest

from serve import identity
from serve.server import command, healthy


class Foreign(http.server.BaseHTTPRequestHandler):
    """Answers everything with 200, as many servers do, and with a header like ours."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header(identity.HEADER, "guessed")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


def test_another_server_is_not_taken_for_ours():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Foreign) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert not healthy("127.0.0.1", server.server_port, "the secret")
        assert not healthy("127.0.0.1", server.server_port, "")
        assert healthy("127.0.0.1", server.server_port, "guessed")
        server.shutdown()


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A server behind our middleware, as vLLM runs it: its port."""
    uvicorn = pytest.importorskip("uvicorn")
    from starlette.applications import Starlette
    from starlette.responses import Response
    from starlette.routing import Route

    monkeypatch.setenv(identity.VARIABLE, "the secret")
    routes = [Route(path, lambda request: Response(status_code=200)) for path in ("/health", "/v1/models")]
    app = Starlette(routes=routes)
    app.add_middleware(identity.Identified)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()


def test_our_server_proves_its_secret_on_one_path(ours: int):
    import urllib.request

    assert healthy("127.0.0.1", ours, "the secret")
    assert not healthy("127.0.0.1", ours, "another")
    with urllib.request.urlopen(f"http://127.0.0.1:{ours}/v1/models", timeout=10) as answer:
        assert identity.HEADER not in answer.headers


def test_the_secret_is_on_no_command_line():
    from serve.engine import EngineConfig

    line = command(EngineConfig("m", 8, "bfloat16", 128, 2**20, eager=True), "name", "127.0.0.1", 1)
    assert line[line.index("--middleware") + 1] == "serve.identity.Identified"
