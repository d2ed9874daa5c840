"""A small blocking HTTP client for the commands: stdlib only, so that they start at once."""

from __future__ import annotations

import http.client
import json
import os
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

from daemon.addresses import Address, TcpAddress, candidates

_FIND_TIMEOUT_S = 0.5
FAILED, USAGE, NO_DAEMON, INTERRUPTED = 1, 2, 3, 130


class CommandError(Exception):
    """What a command tells the user before it ends with `status`."""

    def __init__(self, message: str, status: int = FAILED) -> None:
        super().__init__(message)
        self.status = status


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float | None) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _connection(address: Address, timeout: float | None) -> http.client.HTTPConnection:
    if isinstance(address, TcpAddress):
        return http.client.HTTPConnection(address.host, address.port, timeout=timeout)
    return _UnixConnection(address.path, timeout)


def find() -> Address:
    """Return the address of a daemon that answers. Raises CommandError."""
    for address in candidates(os.environ):
        connection = _connection(address, _FIND_TIMEOUT_S)
        try:
            connection.request("HEAD", "/.well-known/health")
            if connection.getresponse().status == http.HTTPStatus.OK:
                return address
        except (OSError, http.client.HTTPException):
            continue
        finally:
            connection.close()
    where = os.environ.get("MODELD_HOST", "the usual addresses")
    raise CommandError(
        f"no modeld answers at {where}: start it with `modeld serve`, or set MODELD_HOST", NO_DAEMON
    )


class Client:
    """Requests to one daemon. Errors become CommandErrors with the daemon's own words."""

    def __init__(self, address: Address) -> None:
        self._address = address

    def _open(
        self, method: str, path: str, body: Any
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = _connection(self._address, None)
        headers = {"Content-Type": "application/json"} if body is not None else {}
        payload = None if body is None else json.dumps(body)
        try:
            connection.request(method, path, payload, headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise CommandError(
                f"modeld at {self._address} went away: {error}", NO_DAEMON
            ) from error
        if response.status >= http.HTTPStatus.BAD_REQUEST:
            text = response.read().decode("utf-8", "replace")
            raise CommandError(_message(text) or f"HTTP {response.status}")
        return connection, response

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """Return the JSON answer to a request, or None if it is empty."""
        connection, response = self._open(method, path, body)
        try:
            data = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise CommandError(
                f"modeld at {self._address} went away: {error}", NO_DAEMON
            ) from error
        finally:
            connection.close()
        return json.loads(data) if data else None

    def events(self, path: str, body: Any) -> Iterator[Any]:
        """Yield the JSON of server-sent events until `[DONE]`.

        Raises CommandError for an error event, and for a stream that is cut off.
        """
        connection, response = self._open("POST", path, body)
        try:
            while line := response.readline():
                if not line.startswith(b"data: "):
                    continue
                data = line.removeprefix(b"data: ").strip()
                if data == b"[DONE]":
                    return
                event = json.loads(data)
                if "error" in event:
                    raise CommandError(event["error"]["message"])
                yield event
            raise CommandError("the answer was cut off")
        except (OSError, http.client.HTTPException) as error:
            raise CommandError(f"the answer was cut off: {error}", NO_DAEMON) from error
        finally:
            connection.close()

    def model_path(self, name: str) -> str:
        """Return the native path of a model."""
        return f"/modeld/v1/models/{quote(name, safe='')}"

    def download_path(self, name: str) -> str:
        """Return the native path of a model's download."""
        return f"/modeld/v1/downloads/{quote(name, safe='')}"


def _message(text: str) -> str:
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text.strip()
