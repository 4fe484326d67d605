"""Who may talk to a vLLM server: whoever has its key. Runs in vLLM's interpreter (`--middleware
phi4r_guard.Guard`); only the standard library.

vLLM's own check of VLLM_API_KEY covers /v1, /v2, /inference and /cohere, and leaves open the endpoints of
VLLM_SERVER_DEV_MODE, which replace weights and call methods of the workers. This one covers everything but
GET /health.
"""

import hashlib
import hmac
import os
from typing import Any

OPEN = ("/health",)


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()


class Guard:
    """ASGI middleware: 401 for what does not carry "Authorization: Bearer $VLLM_API_KEY"."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.expected = _digest(b"Bearer " + os.environ["VLLM_API_KEY"].encode())

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" or scope["path"] in OPEN or self._knows_key(scope):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            header = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 401, "headers": header})
            await send({"type": "http.response.body", "body": b'{"error": "Unauthorized"}'})

    def _knows_key(self, scope: dict[str, Any]) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(_digest(given), self.expected)
