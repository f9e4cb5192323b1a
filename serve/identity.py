"""How our server is told from any other that answers on its port: it proves a secret that only its starter knows.

vLLM's server imports `Identified` (its option --middleware) and so runs this in its own process: keep it free of imports.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

VARIABLE = "TINYLLAMA_SERVER_SECRET"  # in the environment of the server
HEADER = "x-tinyllama-server"
PATH = "/health"
Message = MutableMapping[str, Any]
App = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]


class Identified:
    """ASGI middleware: answers of PATH carry the secret; all others pass untouched."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(
        self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
    ) -> None:
        if scope["type"] != "http" or scope["path"] != PATH:
            await self.app(scope, receive, send)
            return

        async def identified(message: Message) -> None:
            if message["type"] == "http.response.start":
                header = (HEADER.encode(), os.environ.get(VARIABLE, "").encode())
                message["headers"] = [*message.get("headers", []), header]
            await send(message)

        await self.app(scope, receive, identified)
