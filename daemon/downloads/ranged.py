"""Files on the network: GETs of our own for parts of them, with every answer checked.

Owns redirects, credentials on the way, timeouts and what a server's answer may look like. Knows
HTTP, but no hub, no channel, and not what the bytes are for.
"""

from __future__ import annotations

import base64
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self
from urllib.parse import unquote

import aiohttp
from yarl import URL

from daemon import __version__
from daemon.downloads import publish
from daemon.downloads.network_errors import Position, Unsteady, explained, refusal
from daemon.downloads.publish import VerificationFailed
from daemon.downloads.redirects import MAX_REDIRECTS, follow, shown
from daemon.errors import DownloadFailed, InvalidRequest
from daemon.sources import UrlSource, public

# What is on its way when a fetcher is killed has to be fetched again: eight connections together
# have some 7 MB of it. That is 7 MB/s for each with a round trip of 50 ms.
_SOCKET_BYTES = 384 * 1024
_READ_BYTES = 256 * 1024
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """One file on the network; None is not known.

    `git_sha1` is the id that Git gives the content. `etag` is the version that an earlier answer to
    this transfer gave (its ETag, else its Last-Modified): another one is refused.
    `headers` may hold credentials, which go to the origin of `url` and nowhere else.
    """

    name: str
    url: str
    size_bytes: int | None = None
    sha256: str | None = None
    git_sha1: str | None = None
    etag: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """Seconds to wait for a connection, for the next byte of one, and to keep on without any byte.

    The last is less before the first byte: the address may be wrong.
    """

    connect_s: float = 30.0
    stall_s: float = 20.0
    patience_s: float = 300.0
    first_patience_s: float = 20.0


class Changed(VerificationFailed):
    """The server's file is another one than before."""


class Answer:
    """The bytes of a file as a server sends them, after what it said of them was checked.

    `total_bytes` is the size of the whole file, `etag` its version; None is not said. A `whole`
    answer has all of the file, asked for or not. `found` is the file at the address that answered:
    asking there again takes no redirects. Leaving an answer hangs up unless all of it was read.
    """

    def __init__(
        self,
        response: aiohttp.ClientResponse,
        remote: RemoteFile,
        where: Position,
        *,
        timeout: aiohttp.ClientTimeout,
        total_bytes: int | None,
        etag: str | None,
        found: RemoteFile,
    ) -> None:
        self.total_bytes = total_bytes
        self.etag = etag
        self.whole = response.status == 200
        self.found = found
        self._response = response
        self._remote = remote
        self._where = where
        self._timeout = timeout

    async def more(self) -> bytes:
        """Return the next bytes; none once all that were promised are here.

        Raises DownloadFailed, and VerificationFailed if there are more of them.
        """
        where = self._where
        with explained(self._remote.name, self._remote.url, self._timeout, where):
            chunk = await self._response.content.readany()
        if where.end is not None and where.at + len(chunk) > where.end:
            raise VerificationFailed(
                f"{self._remote.name}: the server sends more than the {where.end:,} bytes it has"
            )
        where.at += len(chunk)
        if not chunk and where.end is not None and where.at != where.end:
            raise Unsteady(f"{self._remote.name}: the server stopped {where}")
        return chunk

    def close(self) -> None:
        """Hang up, unless all was read: then the connection is free for the next request."""
        self._response.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def from_url(source: UrlSource) -> RemoteFile:
    """Return the file at an address; a user and password in that become a header.

    Raises InvalidRequest if it is no http(s) address of a file.
    """
    url = source.url
    try:
        parsed = URL(url)
    except ValueError as error:
        raise InvalidRequest(f"{public(url)!r} is not an address: {error}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InvalidRequest(f"{public(url)!r} is not an http(s) address")
    headers = {}
    if parsed.user is not None or parsed.password is not None:
        pair = f"{parsed.user or ''}:{parsed.password or ''}".encode()
        headers["Authorization"] = "Basic " + base64.b64encode(pair).decode("ascii")
    name = publish.file_name(unquote(parsed.raw_path))
    return RemoteFile(
        name=name,
        url=str(parsed.with_user(None)),
        sha256=source.sha256 or None,
        headers=headers,
    )


def session(timeouts: Timeouts) -> aiohttp.ClientSession:
    """Return a client that honours proxy settings, keeps no cookies and decodes nothing."""
    return aiohttp.ClientSession(
        trust_env=True,
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        read_bufsize=_READ_BYTES,
        connector=aiohttp.TCPConnector(socket_factory=_socket, limit=0),
        timeout=aiohttp.ClientTimeout(
            connect=timeouts.connect_s, sock_connect=timeouts.connect_s, sock_read=timeouts.stall_s
        ),
        headers={"User-Agent": f"modeld/{__version__}", "Accept-Encoding": "identity"},
    )


def _socket(info: aiohttp.AddrInfoType) -> socket.socket:
    family, kind, protocol, _, _ = info
    opened = socket.socket(family, kind, protocol)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BYTES)
    return opened


async def ask(
    client: aiohttp.ClientSession,
    remote: RemoteFile,
    *,
    start: int = 0,
    end: int | None = None,
    or_whole: bool = False,
) -> Answer:
    """Ask for the bytes of `remote` from `start` up to `end`, or its end if that comes first.

    `or_whole` takes all of the file from a server that gives no parts. Raises DownloadFailed, and
    VerificationFailed if the server's file is not the one expected.
    """
    where = Position(at=start, end=end)
    with explained(remote.name, remote.url, client.timeout, where):
        response, found, etag = await _open(client, remote, _range(start, end))
    try:
        total = _check(response, remote, etag, start, end, or_whole=or_whole)
    except BaseException:
        response.close()
        raise
    if response.status == 200 or end is None:
        where.end = total
    elif total is not None:
        where.end = min(end, total)
    return Answer(
        response,
        remote,
        where,
        timeout=client.timeout,
        total_bytes=total,
        etag=etag,
        found=replace(found, size_bytes=total),
    )


def _range(start: int, end: int | None) -> str:
    return f"bytes={start}-{'' if end is None else end - 1}"


async def _open(
    client: aiohttp.ClientSession, remote: RemoteFile, byte_range: str
) -> tuple[aiohttp.ClientResponse, RemoteFile, str | None]:
    """Follow redirects to the answer that has the bytes.

    Return it, the file where it was found, and the file's ETag. A hub names the file's version on
    its redirect (X-Linked-Etag): the ETag of the storage behind it says something else, and may
    differ from one address of that storage to the next.
    """
    url = URL(remote.url, encoded=True)
    headers = dict(remote.headers)
    linked: str | None = None
    seen: set[URL] = set()
    while url not in seen and len(seen) <= MAX_REDIRECTS:
        seen.add(url)
        asked = {**headers, "Range": byte_range}
        response = await client.get(url, headers=asked, allow_redirects=False)
        linked = linked or _plain(response.headers.get("X-Linked-Etag"))
        target = response.headers.get("Location")
        if response.status not in (301, 302, 303, 307, 308) or target is None:
            etag = _plain(response.headers.get("ETag")) or response.headers.get("Last-Modified")
            found = replace(remote, url=str(url), headers=headers, etag=etag)
            return response, found, linked or etag
        response.close()
        following = follow(url, target, remote.name)
        headers = shown(headers, url, following)
        url = following
    problem = "in a circle" if url in seen else f"more than {MAX_REDIRECTS} times"
    raise DownloadFailed(f"{remote.name}: {URL(remote.url).host} redirects {problem}")


def _plain(etag: str | None) -> str | None:
    return etag.removeprefix("W/").strip('"') if etag else None


def _check(
    response: aiohttp.ClientResponse,
    remote: RemoteFile,
    etag: str | None,
    start: int,
    end: int | None,
    *,
    or_whole: bool,
) -> int | None:
    """Return the whole file's size, if the answer is the range that was asked for."""
    host, name = response.url.host, remote.name
    if response.status not in (200, 206):
        raise refusal(response, name)
    if response.content_type == "text/html":  # which no file of a model is
        raise Unsteady(
            f"{name}: {host} sends a web page in its place: does this network ask for a login, "
            "or is the address that of a page?"
        )
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise DownloadFailed(f"{name}: {host} sends it encoded ({encoding}), though not asked to")
    if remote.etag is not None and etag != remote.etag:
        raise Changed(
            f"{name} was changed on {host}: its ETag is {etag}, and was {remote.etag} before"
        )
    total = response.content_length
    if response.status == 206:
        total = _total_of_range(response, name, start, end)
    elif not or_whole and (start != 0 or end is not None):
        raise DownloadFailed(f"{name}: {host} was asked for a part and sends the whole file")
    if remote.size_bytes is not None and total is not None and total != remote.size_bytes:
        raise VerificationFailed(
            f"{name}: its size on {host} is {total:,} bytes, but it should be "
            f"{remote.size_bytes:,}; nothing was added to the store"
        )
    return remote.size_bytes if total is None else total


def _total_of_range(
    response: aiohttp.ClientResponse, name: str, start: int, end: int | None
) -> int | None:
    text = response.headers.get("Content-Range", "")
    match = _CONTENT_RANGE.fullmatch(text)
    if match is not None and int(match[1]) == start:
        total = None if match[3] == "*" else int(match[3])
        bounds = [bound for bound in (end, total) if bound is not None]
        if not bounds or int(match[2]) + 1 == min(bounds):
            return total
    raise DownloadFailed(
        f"{name}: {response.url.host} was asked for {_range(start, end)} and sent {text!r}"
    )
