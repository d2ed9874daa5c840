"""A hub on this machine, for the real Hugging Face client and for plain downloads.

Runs in a thread of its own, so that blocking and asyncio tests use it alike:

    with LocalHub() as hub:
        hub.add("owner/repo", {"model.Q4_K_M.gguf": b"..."})
        hub.faults.truncate_at = 1000

`hub.url` is its endpoint; files are also at `hub.url + "/files/owner/repo/NAME"`, without a hash.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import socket
import ssl
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, unquote

from aiohttp import web

_CHUNK_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One request as it arrived; `port` is its sender's, the same for all of a connection."""

    method: str
    path: str
    host: str
    range: str
    authorization: str
    port: int


@dataclass(slots=True, kw_only=True)
class Faults:
    """What goes wrong from now on. Offsets and sizes are in bytes of the file."""

    rate_bytes_s: int = 0
    truncate_at: int | None = None  # the connection ends here
    stall_at: int | None = None  # nothing comes after this; sets `LocalHub.stalled`
    corrupt_at: int | None = None  # one bit of this byte is wrong
    no_range: bool = False  # 200 and the whole file, whatever was asked for
    no_size: bool = False  # neither a length nor a total
    extra_bytes: int = 0  # sent after what was promised
    gated: int = 0  # 401 or 403 for files, unless `LocalHub.token` is shown
    status: int = 0  # this status for files
    redirect: str = "cdn"  # or "none", "host", "loop", "endless"
    listed_bytes: int | None = None  # the size that the listing claims
    served_bytes: int | None = None  # the size that the download claims
    etag_counter: bool = False  # each answer with an ETag of its own
    wrong_range: bool = False  # 206 with another part than the one asked for
    encoding: str = ""  # a Content-Encoding that was not asked for
    retry_after: str = ""  # with `status` and `listing_status`
    rate_limit: str = ""  # likewise: what is left of a quota, as RateLimit
    listing_status: int = 0  # this status for listings, so many times
    listing_times: int = -1
    page: bool = False  # 200 and a web page, whatever was asked for, as of a network's login
    times: int = -1  # how many answers with bytes this holds for; -1 is all


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    content: bytes | Path

    @property
    def size(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    def part(self, start: int, end: int) -> bytes:
        if isinstance(self.content, bytes):
            return self.content[start:end]
        with self.content.open("rb") as file:
            file.seek(start)
            return file.read(end - start)

    def git_sha1(self) -> str:
        return hashlib.sha1(b"blob %d\0" % self.size + self.part(0, self.size)).hexdigest()

    def digest(self, kind: str) -> str:
        if isinstance(self.content, bytes):
            return hashlib.new(kind, self.content).hexdigest()
        return _digest(self.content, self.content.stat().st_mtime_ns, kind)


@functools.lru_cache
def _digest(path: Path, mtime_ns: int, kind: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


@dataclass(slots=True, kw_only=True)
class _Repo:
    commit: str
    revision: str
    files: dict[str, _File]
    about: Mapping[str, Any]


@dataclass(slots=True)
class LocalHub:
    """The server. Enter it to start; leaving it ends every connection."""

    faults: Faults = field(default_factory=Faults)
    requests: list[Seen] = field(default_factory=list)
    sent_bytes: int = 0  # of files, as they went into sockets with small buffers
    stalled: threading.Event = field(default_factory=threading.Event)
    token: str = ""
    port: int = 0  # set before it starts: this one
    tls: ssl.SSLContext | None = None
    _repos: dict[str, _Repo] = field(default_factory=dict)
    _answers: int = 0
    _loop: asyncio.AbstractEventLoop | None = None
    _thread: threading.Thread | None = None
    _closing: asyncio.Event | None = None

    @property
    def url(self) -> str:
        """The endpoint."""
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self.port}"

    @property
    def other_url(self) -> str:
        """The same server under another host's name."""
        return self.url.replace("127.0.0.1", "localhost")

    def add(
        self,
        repo: str,
        files: Mapping[str, bytes | Path],
        *,
        revision: str = "main",
        about: Mapping[str, Any] | None = None,
    ) -> str:
        """Serve a repository; return its commit. Weights are in LFS, the rest is not.

        `about` is what the hub says of it besides: `tags`, `cardData`.
        """
        kept = {name: _File(content=content) for name, content in files.items()}
        commit = hashlib.sha1(repr((repo, sorted(kept))).encode()).hexdigest()
        self._repos[repo] = _Repo(commit=commit, revision=revision, files=kept, about=about or {})
        return commit

    def file_url(self, repo: str, name: str) -> str:
        """Return a plain address of a file."""
        return f"{self.url}/files/{repo}/{quote(name)}"

    def seen(self, text: str) -> list[Seen]:
        """Return the requests whose path has `text` in it, in order."""
        return [request for request in self.requests if text in request.path]

    def __enter__(self) -> Self:
        started = threading.Event()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._serve(started.set)), name="local-hub"
        )
        self._thread.start()
        assert started.wait(10), "the local hub did not start"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._loop is not None and self._closing is not None and self._thread is not None
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join(10)
        assert not self._thread.is_alive(), "the local hub did not stop"

    async def _serve(self, ready: Callable[[], None]) -> None:
        self._loop, self._closing = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        # A client that goes away, or a stop, ends even a handler that stalls on purpose.
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        listener = socket.create_server(("127.0.0.1", self.port))
        # Little is on its way in buffers here: what was sent is what was received, or nearly.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _CHUNK_BYTES)
        await web.SockSite(runner, listener, ssl_context=self.tls).start()
        self.port = runner.addresses[0][1]
        ready()
        await self._closing.wait()
        await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(
            Seen(
                method=request.method,
                path=request.path_qs,
                host=request.host.partition(":")[0],
                range=request.headers.get("Range", ""),
                authorization=request.headers.get("Authorization", ""),
                port=request.transport.get_extra_info("peername")[1] if request.transport else 0,
            )
        )
        parts = [unquote(part) for part in request.raw_path.partition("?")[0].split("/")[1:]]
        match parts:
            case ["api", "models", owner, repo]:
                return self._info(request, f"{owner}/{repo}", "main")
            case ["api", "models", owner, repo, "revision", revision]:
                return self._info(request, f"{owner}/{repo}", revision)
            case [owner, repo, "resolve", revision, *name]:
                return await self._resolve(request, f"{owner}/{repo}", revision, "/".join(name))
            case ["files" | "cdn", owner, repo, *name]:
                held = self._repos.get(f"{owner}/{repo}")
                if held is None or "/".join(name) not in held.files:
                    return web.Response(status=404)
                if self.faults.redirect == "loop" and parts[0] == "files":
                    return _redirect("/loop/a")
                if self.faults.redirect == "host" and parts[0] == "files":
                    return _redirect(f"{self.other_url}/cdn/{'/'.join(parts[1:])}")
                return await self._send(request, held.files["/".join(name)], linked=False)
            case ["loop", where]:
                return _redirect("/loop/b" if where == "a" else "/loop/a")
            case ["hop", number]:
                return _redirect(f"/hop/{int(number) + 1}")
        return web.Response(status=404)

    def _find(self, request: web.Request, repo: str, revision: str) -> _Repo | web.Response:
        held = self._repos.get(repo)
        if held is None:
            # The real one does not tell an anonymous client what exists.
            known = request.headers.get("Authorization")
            return _error(404 if known else 401, "RepoNotFound", "Repository not found")
        if revision not in (held.revision, held.commit):
            return _error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return held

    def _info(self, request: web.Request, repo: str, revision: str) -> web.Response:
        if self.faults.listing_status and self.faults.listing_times:
            self.faults.listing_times -= 1
            return web.Response(status=self.faults.listing_status, headers=_when_again(self.faults))
        held = self._find(request, repo, revision)
        if isinstance(held, web.Response):
            return held
        siblings = [self._sibling(name, file) for name, file in held.files.items()]
        if request.query.get("blobs", "").lower() != "true":
            siblings = [{"rfilename": sibling["rfilename"]} for sibling in siblings]
        return web.json_response(
            {"id": repo, "sha": held.commit, "siblings": siblings, **held.about}
        )

    def _sibling(self, name: str, file: _File) -> dict[str, object]:
        size = self._listed(file)
        facts: dict[str, object] = {"rfilename": name, "size": size, "blobId": "0" * 40}
        if not name.endswith((".gguf", ".onnx", ".bin")):
            facts["blobId"] = file.git_sha1()
        else:
            facts["lfs"] = {"sha256": file.digest("sha256"), "size": size, "pointerSize": 134}
        return facts

    def _listed(self, file: _File) -> int:
        listed = self.faults.listed_bytes
        return file.size if listed is None else listed

    async def _resolve(
        self, request: web.Request, repo: str, revision: str, name: str
    ) -> web.StreamResponse:
        held = self._find(request, repo, revision)
        if isinstance(held, web.Response):
            return held
        if name not in held.files:
            return _error(404, "EntryNotFound", "Entry not found")
        if self.faults.gated and request.headers.get("Authorization") != f"Bearer {self.token}":
            return _error(self.faults.gated, "GatedRepo", f"Access to {repo} is restricted")
        file = held.files[name]
        if self.faults.redirect == "none":
            return await self._send(request, file, linked=True)
        path = f"/cdn/{repo}/{quote(name)}"
        target = {
            "cdn": path,
            "host": self.other_url + path,
            "loop": "/loop/a",
            "endless": "/hop/0",
        }[self.faults.redirect]
        if request.method == "HEAD":
            # The real storage is another host, to which the client does not follow.
            target = self.other_url + path
        return _redirect(
            target,
            {
                "X-Repo-Commit": held.commit,
                "X-Linked-Etag": f'"{file.digest("sha256")}"',
                "X-Linked-Size": str(self._listed(file)),
            },
        )

    async def _send(self, request: web.Request, file: _File, *, linked: bool) -> web.StreamResponse:
        faults, size = self._now(request), file.size
        if faults.status and request.method == "GET":
            return web.Response(status=faults.status, headers=_when_again(faults))
        if faults.page and request.method == "GET":
            return web.Response(text="<html>Log in</html>", content_type="text/html")
        self._answers += 1
        # As in reality, the storage's ETag is not the file's hash.
        etag = file.digest("sha256" if linked else "md5")
        headers = {"ETag": f'"{etag}{self._answers if faults.etag_counter else ""}"'}
        if faults.encoding:
            headers["Content-Encoding"] = faults.encoding
        claimed = size if faults.served_bytes is None else faults.served_bytes
        first, last = _asked(request.headers.get("Range", ""), claimed)
        partial = bool(request.headers.get("Range")) and not faults.no_range
        if partial:
            shown = first + 1 if faults.wrong_range else first
            total = "*" if faults.no_size else claimed
            headers["Content-Range"] = f"bytes {shown}-{last}/{total}"
        else:
            first, last = 0, claimed - 1
        if not faults.no_size:
            headers["Content-Length"] = str(last + 1 - first + faults.extra_bytes)
        response = web.StreamResponse(status=206 if partial else 200, headers=headers)
        await response.prepare(request)
        if request.method == "GET":
            await self._body(request, response, file, faults, first, last + 1)
        return response

    def _now(self, request: web.Request) -> Faults:
        """Return what goes wrong with this answer."""
        faults = self.faults
        if request.method == "GET" and faults.times >= 0:
            if faults.times == 0:
                return Faults(rate_bytes_s=faults.rate_bytes_s, redirect=faults.redirect)
            faults.times -= 1
        return faults

    async def _body(
        self,
        request: web.Request,
        response: web.StreamResponse,
        file: _File,
        faults: Faults,
        at: int,
        end: int,
    ) -> None:
        if request.transport is not None:
            request.transport.set_write_buffer_limits(high=0)
        stops = [stop for stop in (faults.truncate_at, faults.stall_at) if stop is not None]
        until = min([end, file.size, *stops])
        while at < until:
            chunk = file.part(at, min(at + _CHUNK_BYTES, until))
            if faults.corrupt_at is not None and at <= faults.corrupt_at < at + len(chunk):
                place = faults.corrupt_at - at
                chunk = chunk[:place] + bytes([chunk[place] ^ 1]) + chunk[place + 1 :]
            await response.write(chunk)
            self.sent_bytes += len(chunk)
            at += len(chunk)
            if faults.rate_bytes_s:
                await asyncio.sleep(len(chunk) / faults.rate_bytes_s)
        if faults.stall_at is not None:
            self.stalled.set()
            await asyncio.Event().wait()
        if faults.extra_bytes:
            await response.write(bytes(faults.extra_bytes))
        if at < end and request.transport is not None:
            request.transport.close()


def _asked(text: str, size: int) -> tuple[int, int]:
    """Return the first and the last byte that a Range header asks for."""
    first, _, last = text.removeprefix("bytes=").partition("-")
    return int(first or 0), min(int(last), size - 1) if last else size - 1


def _when_again(faults: Faults) -> dict[str, str]:
    said = {"Retry-After": faults.retry_after, "RateLimit": faults.rate_limit}
    return {name: text for name, text in said.items() if text}


def _redirect(target: str, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(status=302, headers={"Location": target, **(headers or {})})


def _error(status: int, code: str, message: str) -> web.Response:
    return web.Response(
        status=status,
        headers={"X-Error-Code": code, "X-Error-Message": message},
        body=json.dumps({"error": message}),
        content_type="application/json",
    )
