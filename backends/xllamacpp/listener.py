"""The engine's own HTTP listener, for what its Python interface does not offer.

It is a unix socket in the worker's private directory, and asks for a key that nobody else knows.
"""

from __future__ import annotations

import http.client
import json
import secrets
import socket
from pathlib import Path
from typing import Any

from backends.contract import BackendError
from backends.xllamacpp import bodies

_TIMEOUT_S = 60.0


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Listener:
    """The address and the key that an engine is started with, and calls to it after that."""

    def __init__(self) -> None:
        # Relative to the worker's own directory, since the path of a socket has a short limit.
        self.path = f"{secrets.token_hex(4)}.sock"
        self.key = secrets.token_hex(32)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Return the engine's answer. Raises BackendError: "invalid_request" where it is a 400."""
        answer: dict[str, Any] = self._ask("POST", path, json.dumps(body).encode())
        return answer

    def get(self, path: str) -> Any:
        """Return the engine's answer. Raises BackendError("engine_error")."""
        return self._ask("GET", path, None)

    def _ask(self, method: str, path: str, body: bytes | None) -> Any:
        connection = _Connection(self.path)
        try:
            headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            answer = json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise BackendError("engine_error", f"xllamacpp at {path}: {error}") from error
        finally:
            connection.close()
        if response.status == 400:
            raise bodies.error(answer["error"])
        if response.status != 200:
            raise BackendError("engine_error", f"xllamacpp at {path}: {answer.get('error')}")
        return answer

    def close(self) -> None:
        """Remove the socket."""
        Path(self.path).unlink(missing_ok=True)
