"""The live page at `/`, from files of this package, and the data that it shows."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi.responses import JSONResponse, Response

from ..client import EngineClient
from ..errors import ServingError
from ..snapshot import SystemSnapshot

FOLDER = Path(__file__).with_name("page")
# By path: the file's name and media type. Nothing else of the folder, or outside of it, is served.
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/graph.js": ("graph.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
HEADERS = {
    "Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}  # fmt: skip
WITHOUT_KEY, WITH_KEY = 'data-key="none"', 'data-key="required"'


class LivePage:
    """The page's files, read once, and the state that it asks for.

    The page itself is everybody's; the state has clients' names, and is for admins.

    Args:
        key_required: the page asks for an admin's key before it asks for the state.
        wait_s: seconds that an answer waits for the engine to end its step; then the last snapshot is given again.
    """

    def __init__(self, client: EngineClient, model_name: str, key_required: bool, wait_s: float) -> None:
        self._client, self._model_name, self._wait_s = client, model_name, wait_s
        self._started_s = time.time()
        self._last: SystemSnapshot | None = None
        self._files = {path: (FOLDER / name).read_bytes() for path, (name, _) in FILES.items()}
        if key_required:
            self._files["/"] = self._files["/"].replace(WITHOUT_KEY.encode(), WITH_KEY.encode())

    def file(self, path: str) -> Response:
        """The file at a path of `FILES`."""
        return Response(self._files[path], media_type=FILES[path][1], headers=HEADERS)

    async def state(self) -> Response:
        """The server's and the engine's state, also while the engine computes, drains or is dead."""
        try:
            taken = asyncio.wrap_future(self._client.snapshot())
            # Others wait for the same snapshot, so it is not cancelled with this answer.
            self._last = await asyncio.wait_for(asyncio.shield(taken), self._wait_s)
        except asyncio.TimeoutError:
            pass  # a long step: the last one is of use
        except ServingError:
            pass  # the engine is dead or closed, which its health says
        return JSONResponse(self._document(), headers={"Cache-Control": "no-store"})

    def _document(self) -> dict[str, Any]:
        health, now, last = self._client.health(), time.time(), self._last
        status = "ok" if health.accepting else "draining" if health.alive else "dead"
        return {
            "status": status,
            "model": self._model_name,
            "uptime_s": now - self._started_s,
            "last_step_age_s": health.last_step_age_s,
            "age_s": None if last is None else max(0.0, now - last.taken),
            "snapshot": None if last is None else asdict(last),
        }
