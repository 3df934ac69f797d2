"""``GET /fusedstep/explain``: what ``fusedstep explain --json`` says, from the server itself.

vLLM's own option ``--middleware fusedstep.vllm_plugin.frontend.ExplainRoute`` puts it in, as
``fusedstep serve`` does. vLLM's endpoint plugins would not do: they are loaded only where
VLLM_PLUGINS names them, and every other server warns of them at its start.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

PATH = "/fusedstep/explain"
OPTION = "fusedstep.vllm_plugin.frontend.ExplainRoute"  # for --middleware

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Scope]]
Send = Callable[[Scope], Awaitable[None]]


class ExplainRoute:
    """ASGI middleware: answers its own path, and hands on every other request as it came."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        root: str = scope.get("root_path", "")
        if scope["type"] != "http" or scope["path"].removeprefix(root) != PATH:
            await self.app(scope, receive, send)
            return
        status, answer = _answer(scope["method"])
        body = json.dumps(answer).encode()
        headers = [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]
        headers += [(b"content-length", str(len(body)).encode())]
        headers += [(b"allow", b"GET, HEAD")] if status == 405 else []
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send(
            {"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body}
        )


def _answer(method: str) -> tuple[int, dict[str, object]]:
    """Status and body."""
    from fusedstep.vllm_plugin import metrics

    if method not in ("GET", "HEAD"):
        return 405, {"error": f"{PATH} can only be read"}
    if not metrics.engines:
        words = (
            "fusedstep is off here (start it with FUSEDSTEP=on), or --disable-log-stats is given"
        )
        return 404, {"error": f"no windows: {words}"}
    counts = metrics.all_counts()
    if counts is None:
        return 404, {"error": "no windows yet: nothing has been asked"}
    return 200, counts.as_dict()
