"""HTTP to one upstream: bounded answers, timeouts, retries before the first token, plain errors.

The key goes into one header, to that one host: redirects are not followed, no proxy or .netrc is
looked up, and whatever an upstream says is searched for the key before anybody sees it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

import aiohttp
import msgspec

from backends.contract import BackendError, Delta, Done, Upstream
from backends.remote.answers import Reading

_BACKOFF_S = (0.25, 1.0)  # before the second and the third try, which is the last
_LONGEST_RETRY_AFTER_S = 5.0
_SLOWEST_UPLOAD_BYTES_S = 100_000
_RETRIED = frozenset({429, 502, 503, 504})
_REFUSED = frozenset({400, 404, 405, 413, 415, 422, 501})
_LINE_BYTES = 8 * 1024 * 1024
_BODY_BYTES = 64 * 1024 * 1024  # what the channel could pass on
_ERROR_BYTES = 64 * 1024
_ERROR_CHARACTERS = 600
_SHOWN_CHARACTERS = 100
_DRAIN_S = 0.2
_TOO_LONG = frozenset({"context_length_exceeded", "exceed_context_size_error"})
T = TypeVar("T")


class _TryAgainError(Exception):
    """What may go better in a moment. `error` is for whoever will not wait."""

    def __init__(self, error: BackendError, after_s: float | None = None) -> None:
        super().__init__(error.message)
        self.error = error
        self.after_s = after_s


def shown(url: str) -> str:
    """Return an upstream's URL as it may be shown."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


class Client:
    """One upstream. Belongs to the event loop that it was made on; `aclose` it there."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        headers = {"Accept-Encoding": "identity", "User-Agent": "modeld"}
        if upstream.api_key:
            headers["Authorization"] = f"Bearer {upstream.api_key}"
        self._session = aiohttp.ClientSession(
            headers=headers,
            connector=aiohttp.TCPConnector(limit=0),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(
                total=None, connect=upstream.connect_timeout_s, sock_read=upstream.read_timeout_s
            ),
            trust_env=False,
        )

    async def aclose(self) -> None:
        """Close all connections."""
        await self._session.close()

    async def get(self, path: str, read: Callable[[object], T]) -> T:
        """Return what `read` makes of the JSON at `path`. Raises BackendError."""
        return self._told(read, await self._retried("GET", path, None))

    async def post(self, path: str, body: dict[str, Any], read: Callable[[object], T]) -> T:
        """Return what `read` makes of the JSON that answers `body`. Raises BackendError."""
        return self._told(read, await self._retried("POST", path, body))

    async def generate(self, path: str, body: dict[str, Any]) -> AsyncGenerator[Delta | Done]:
        """Yield the pieces of a streamed answer, and its Done. Raises BackendError.

        Close it to end the request early: that closes the connection, and the upstream stops.
        """
        for delay in (*_BACKOFF_S, None):
            reading, begun = Reading(), False
            try:
                async with contextlib.aclosing(self._events(path, body)) as events:
                    async for event in events:
                        if delta := self._told(reading.feed, event):
                            begun = True
                            yield delta
                yield self._told(reading.done)
            except _TryAgainError as problem:
                if begun or delay is None:
                    raise problem.error from problem
                await asyncio.sleep(delay if problem.after_s is None else problem.after_s)
            else:
                return

    async def _retried(self, method: str, path: str, body: dict[str, Any] | None) -> object:
        for delay in _BACKOFF_S:
            try:
                return await self._json(method, path, body)
            except _TryAgainError as problem:
                await asyncio.sleep(delay if problem.after_s is None else problem.after_s)
        try:
            return await self._json(method, path, body)
        except _TryAgainError as problem:
            raise problem.error from problem

    async def _json(self, method: str, path: str, body: dict[str, Any] | None) -> object:
        async with self._answer(method, path, body) as response:
            text = bytearray()
            async for chunk in response.content.iter_any():
                text += chunk
                if len(text) > _BODY_BYTES:
                    raise self._error(f"its answer to {path} is over {_BODY_BYTES} bytes")
            return self._parsed(bytes(text), path)

    async def _events(
        self, path: str, body: dict[str, Any]
    ) -> AsyncGenerator[dict[str, Any] | None]:
        """Yield each event of an answer, and None for the word that it is the last one."""
        async with self._answer("POST", path, body) as response:
            if response.content_type != "text/event-stream":
                raise self._error(
                    f"it answered {path} with {response.content_type}, not with an event stream"
                )
            async with contextlib.aclosing(self._lines(response.content)) as lines:
                async for line in lines:
                    data = line[5:].strip() if line.startswith(b"data:") else b""
                    if data == b"[DONE]":
                        yield None
                        break
                    if data:
                        yield self._event(data, path)
            await _drain(response.content)

    async def _lines(self, content: aiohttp.StreamReader) -> AsyncGenerator[bytes]:
        unfinished = b""
        async for chunk in content.iter_any():
            *lines, unfinished = (unfinished + chunk).split(b"\n")
            for line in lines:
                yield line
            if len(unfinished) > _LINE_BYTES:
                raise self._error(f"it sent a line of over {_LINE_BYTES} bytes")
        yield unfinished

    def _event(self, data: bytes, path: str) -> dict[str, Any]:
        event = self._parsed(data, path)
        if not isinstance(event, dict):
            raise self._error(f"it sent a {type(event).__name__} where an event was due")
        if event.get("error"):
            raise self._refusal(event)
        return event

    def _parsed(self, text: bytes, path: str) -> object:
        try:
            return msgspec.json.decode(text)  # json would take NaN and halves of characters
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            start = self._scrubbed(text.decode("utf-8", "replace"))[:_SHOWN_CHARACTERS]
            raise self._error(f"its answer to {path} is not JSON: {start!r}") from error

    @contextlib.asynccontextmanager
    async def _answer(
        self, method: str, path: str, body: dict[str, Any] | None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Give the upstream's answer, if it is one of success."""
        data = None if body is None else json.dumps(body).encode()
        # aiohttp's own read timeout begins once the body is out, which may be never.
        upload_s = len(data or b"") / _SLOWEST_UPLOAD_BYTES_S
        patience_s = self._upstream.connect_timeout_s + self._upstream.read_timeout_s + upload_s
        try:
            async with asyncio.timeout(patience_s):
                response = await self._session.request(
                    method,
                    f"{self._upstream.url}{path}",
                    data=data,
                    headers={"Content-Type": "application/json"} if data is not None else {},
                    allow_redirects=False,
                )
            async with response:
                if response.status != 200:
                    await self._raise_for(response)
                yield response
        except aiohttp.ConnectionTimeoutError as error:
            seconds = self._upstream.connect_timeout_s
            raise _TryAgainError(self._error(f"no connection within {seconds:g} s")) from error
        except aiohttp.ServerTimeoutError as error:
            seconds = self._upstream.read_timeout_s
            raise self._error(f"it sent nothing for {seconds:g} s") from error
        except TimeoutError as error:
            raise self._error(f"it sent nothing for {patience_s:g} s") from error
        except (aiohttp.ClientSSLError, ssl.SSLError) as error:
            raise self._error(f"its TLS certificate or handshake was refused: {error}") from error
        except aiohttp.ClientConnectorError as error:
            raise _TryAgainError(self._error(f"it cannot be reached: {error}")) from error
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
            raise _TryAgainError(
                self._error(f"the connection broke off before the answer was whole: {error}")
            ) from error
        except aiohttp.ClientError as error:
            raise self._error(f"it does not speak HTTP as it should: {error}") from error

    async def _raise_for(self, response: aiohttp.ClientResponse) -> None:
        """Raise what an answer other than 200 means."""
        status = response.status
        if 300 <= status < 400:
            raise self._error(
                f"it redirects to {self._target(response)}, where the key does not go: if that is "
                "right, make it the url of this upstream"
            )
        if status in (401, 403):
            how = "refused the key" if self._upstream.api_key else "wants a key (api_key)"
            raise self._error(f"it {how} (HTTP {status})")
        text = bytearray()
        async for chunk in response.content.iter_any():
            text += chunk
            if len(text) > _ERROR_BYTES:
                break
        error = self._refusal(_json_or_text(bytes(text)), status)
        if status not in _RETRIED or response.headers.get("x-should-retry") == "false":
            raise error
        after_s = _seconds(response.headers.get("Retry-After"))
        if after_s is not None and after_s > _LONGEST_RETRY_AFTER_S:
            raise BackendError(
                error.code, f"{error.message}; it asks to come back in {after_s:g} s"
            )
        raise _TryAgainError(error, after_s)

    def _target(self, response: aiohttp.ClientResponse) -> str:
        try:
            return shown(urljoin(self._upstream.url, response.headers.get("Location", "")))
        except ValueError:
            return "an address that is none"

    def _refusal(self, answer: object, status: int | None = None) -> BackendError:
        """Return the error that an upstream's own is; `status` None is one in mid-stream."""
        error = answer.get("error") or answer if isinstance(answer, dict) else answer
        code = kind = ""
        text = error
        if isinstance(error, dict):
            code, kind = str(error.get("code", "")), str(error.get("type", ""))
            text = error.get("message") or error.get("detail") or json.dumps(error)
        message = f"it says: {self._scrubbed(str(text))[:_ERROR_CHARACTERS]}"
        if status is not None:
            message += f" (HTTP {status})"
        if code in _TOO_LONG or kind in _TOO_LONG:
            refusal = self._error(message, "context_length_exceeded")
            # llama.cpp's server tells how long the prompt is
            tokens = error.get("n_prompt_tokens") if isinstance(error, dict) else None
            refusal.tokens = tokens if isinstance(tokens, int) else None
            return refusal
        if status in _REFUSED or (status is None and kind == "invalid_request_error"):
            return self._error(message, "invalid_request")
        return self._error(message, "queue_full" if status == 429 else "engine_error")

    def _told(self, read: Callable[..., T], *arguments: object) -> T:
        """Return what `read` makes of an answer; its errors say whose answer that was."""
        try:
            return read(*arguments)
        except BackendError as error:
            raise self._error(error.message, error.code) from error

    def _error(self, text: str, code: str = "engine_error") -> BackendError:
        return BackendError(
            code, self._scrubbed(f"the upstream {shown(self._upstream.url)}: {text}")
        )

    def _scrubbed(self, text: str) -> str:
        """Return `text` without the key. Comes before any cut, which could leave half of it."""
        key = self._upstream.api_key
        return text.replace(key, "[the key]") if key else text


def _json_or_text(body: bytes) -> object:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return body.decode("utf-8", "replace").strip() or "nothing"


def _seconds(retry_after: str | None) -> float | None:
    """Return the seconds that a Retry-After header asks for; its form with a date is not heeded."""
    return float(retry_after) if retry_after and retry_after.isdecimal() else None


async def _drain(content: aiohttp.StreamReader) -> None:
    """Read what may follow the last event: a connection can be used again only at its end."""
    with contextlib.suppress(TimeoutError, aiohttp.ClientError):
        async with asyncio.timeout(_DRAIN_S):
            async for _ in content.iter_any():
                pass
