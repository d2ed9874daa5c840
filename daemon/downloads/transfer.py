"""The bytes of a file on the network: ranged GETs of our own, with every answer checked.

Owns redirects, credentials on the way, timeouts and what a server's answer may look like. Knows
HTTP, but no hub, no channel and nothing of the store beyond the file it writes to.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote

import aiohttp
from yarl import URL

from daemon import __version__
from daemon.downloads import publish
from daemon.downloads.publish import Report, VerificationFailed
from daemon.errors import DownloadFailed, InvalidRequest

MAX_REDIRECTS = 10
_RECHECK_BYTES = 64 * 1024 * 1024  # how often the room on the disk is looked at again
_READ_BYTES = 1024 * 1024
_CREDENTIALS = frozenset({"authorization", "cookie"})
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """One file on the network; None is not known.

    `etag` is the version that an earlier answer to this transfer gave: another one is refused.
    `headers` may hold credentials, which go to the origin of `url` and nowhere else.
    """

    name: str
    url: str
    size_bytes: int | None = None
    sha256: str | None = None
    etag: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """Seconds to wait for a connection, and for the next byte of one."""

    connect_s: float = 30.0
    stall_s: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """What a server said about the file before its first byte; None is not said."""

    total_bytes: int | None
    etag: str | None


def from_url(url: str) -> RemoteFile:
    """Return the file at `url`; a user and password in it become a header.

    Raises InvalidRequest if it is no http(s) address of a file.
    """
    try:
        parsed = URL(url)
    except ValueError as error:
        raise InvalidRequest(f"{url!r} is not an address: {error}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InvalidRequest(f"{url!r} is not an http(s) address")
    headers = {}
    if parsed.user is not None or parsed.password is not None:
        pair = f"{parsed.user or ''}:{parsed.password or ''}".encode()
        headers["Authorization"] = "Basic " + base64.b64encode(pair).decode("ascii")
    name = publish.file_name(unquote(parsed.raw_path))
    return RemoteFile(name=name, url=str(parsed.with_user(None)), headers=headers)


def session(timeouts: Timeouts) -> aiohttp.ClientSession:
    """Return a client that honours proxy settings, keeps no cookies and decodes nothing."""
    return aiohttp.ClientSession(
        trust_env=True,
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        read_bufsize=_READ_BYTES,
        timeout=aiohttp.ClientTimeout(
            connect=timeouts.connect_s, sock_connect=timeouts.connect_s, sock_read=timeouts.stall_s
        ),
        headers={"User-Agent": f"modeld/{__version__}", "Accept-Encoding": "identity"},
    )


async def download(
    to: publish.Destination, remote: RemoteFile, timeouts: Timeouts, report: Report
) -> str:
    """Fetch all of `remote` into `partial_dir`, under its own name; return its SHA-256.

    Raises DownloadFailed, VerificationFailed and InsufficientDisk.
    """
    digest = hashlib.sha256()
    expected = done = checked = 0

    def opened(answer: Opened) -> None:
        nonlocal expected
        expected = answer.total_bytes or 0
        publish.require_room(to.partial_dir, expected)
        report(0, expected)

    def landed(chunk: bytes) -> None:
        nonlocal done, checked
        digest.update(chunk)
        done += len(chunk)
        if done - checked >= _RECHECK_BYTES:
            checked = done
            publish.require_room(to.partial_dir, 0)
        report(done, expected)

    with publish.open_partial(to, remote.name) as file:
        if remote.size_bytes is not None:
            opened(Opened(total_bytes=remote.size_bytes, etag=remote.etag))
        async with session(timeouts) as client:
            await download_range(client, remote, file.fileno(), opened=opened, landed=landed)
    sha256 = digest.hexdigest()
    if remote.sha256 and sha256 != remote.sha256:
        raise VerificationFailed(
            f"{remote.name}: the SHA-256 of what arrived is {sha256}, but it should be "
            f"{remote.sha256}; it was thrown away, and nothing was added to the store"
        )
    return sha256


async def download_range(
    client: aiohttp.ClientSession,
    remote: RemoteFile,
    fd: int,
    *,
    start: int = 0,
    end: int | None = None,
    opened: Callable[[Opened], None],
    landed: Callable[[bytes], None],
) -> None:
    """Write the bytes from `start` up to `end` of `remote` to `fd`, at the offsets they have there.

    `end` None is the file's end. `opened` is called once before the first byte, and `landed` with
    every chunk after it was written, in order; what they raise ends the transfer. Raises
    DownloadFailed, and VerificationFailed if the server's file is not the one expected.
    """
    where = _Position(at=start, end=end)
    with _explained(remote, client.timeout, where):
        response, etag = await _open(client, remote, _range(start, end))
        async with response:
            total = _check(response, remote, etag, start, end)
            opened(Opened(total_bytes=total, etag=etag))
            where.end = total if end is None else end
            while chunk := await response.content.readany():
                if where.end is not None and where.at + len(chunk) > where.end:
                    raise VerificationFailed(
                        f"{remote.name}: the server sends more than the {where.end:,} bytes it has"
                    )
                publish.write_at(fd, chunk, where.at)
                where.at += len(chunk)
                landed(chunk)
    if where.end is not None and where.at != where.end:
        raise DownloadFailed(f"{remote.name}: the server stopped {where}")


@dataclass(slots=True, kw_only=True)
class _Position:
    """How far a transfer is; reads as `after 1,000 bytes of 2,000`."""

    at: int
    end: int | None

    def __str__(self) -> str:
        return f"after {self.at:,} bytes" + (f" of {self.end:,}" if self.end is not None else "")


def _range(start: int, end: int | None) -> str:
    return f"bytes={start}-{'' if end is None else end - 1}"


async def _open(
    client: aiohttp.ClientSession, remote: RemoteFile, byte_range: str
) -> tuple[aiohttp.ClientResponse, str | None]:
    """Follow redirects to the answer that has the bytes; return it and the file's ETag.

    A hub names the file's version on its redirect (X-Linked-Etag): the ETag of the storage behind
    it says something else, and may differ from one address of that storage to the next.
    """
    url = URL(remote.url, encoded=True)
    headers = {**remote.headers, "Range": byte_range}
    linked: str | None = None
    seen: set[URL] = set()
    while url not in seen and len(seen) <= MAX_REDIRECTS:
        seen.add(url)
        response = await client.get(url, headers=headers, allow_redirects=False)
        linked = linked or _plain(response.headers.get("X-Linked-Etag"))
        target = response.headers.get("Location")
        if response.status not in (301, 302, 303, 307, 308) or target is None:
            return response, linked or _plain(response.headers.get("ETag"))
        response.close()
        following = _follow(url, target, remote.name)
        if not _same_origin(url, following):
            headers = {k: v for k, v in headers.items() if k.lower() not in _CREDENTIALS}
        url = following
    problem = "in a circle" if url in seen else f"more than {MAX_REDIRECTS} times"
    raise DownloadFailed(f"{remote.name}: {URL(remote.url).host} redirects {problem}")


def _follow(url: URL, target: str, name: str) -> URL:
    """Return where `target` leads from `url`, byte for byte: it may be signed."""
    try:
        following = url.join(URL(target, encoded=target.isascii())).with_user(None)
    except ValueError as error:
        raise DownloadFailed(f"{name}: {url.host} redirects to no address ({error})") from error
    if following.scheme not in ("http", "https"):
        raise DownloadFailed(f"{name}: {url.host} redirects to {following.scheme}:, not to http(s)")
    if url.scheme == "https" and following.scheme == "http":
        raise DownloadFailed(f"{name}: {url.host} redirects to an address without TLS")
    return following


def _same_origin(here: URL, there: URL) -> bool:
    """Say whether what authorises at `here` may be shown at `there`: its origin, or that on TLS."""
    upgrade = (here.scheme, here.port, there.scheme, there.port) == ("http", 80, "https", 443)
    same = (here.scheme, here.port) == (there.scheme, there.port)
    return here.host == there.host and (same or upgrade)


def _plain(etag: str | None) -> str | None:
    return etag.removeprefix("W/").strip('"') if etag else None


def _check(
    response: aiohttp.ClientResponse,
    remote: RemoteFile,
    etag: str | None,
    start: int,
    end: int | None,
) -> int | None:
    """Return the whole file's size, if the answer is the range that was asked for."""
    host, name = response.url.host, remote.name
    if response.status not in (200, 206):
        raise DownloadFailed(_refusal(response, name))
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise DownloadFailed(f"{name}: {host} sends it encoded ({encoding}), though not asked to")
    if remote.etag is not None and etag != remote.etag:
        raise VerificationFailed(
            f"{name} was changed on {host}: its ETag is {etag}, and was {remote.etag} before"
        )
    total = response.content_length
    if response.status == 206:
        total = _total_of_range(response, name, start, end)
    elif start != 0 or end is not None:
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
        last = end if end is not None else total
        if last is None or int(match[2]) + 1 == last:
            return total
    raise DownloadFailed(
        f"{name}: {response.url.host} was asked for {_range(start, end)} and sent {text!r}"
    )


def _refusal(response: aiohttp.ClientResponse, name: str) -> str:
    said = f"{response.url.host} answered HTTP {response.status} {response.reason} for {name}"
    match response.status:
        case 401 | 403:
            return f"{said}: it may be read only by those whom its owner allows to"
        case 429:
            return f"{said}: it limits how often it is asked; try again later"
        case 416:
            return f"{said}: the file is empty or shorter than expected"
    return said


@contextlib.contextmanager
def _explained(
    remote: RemoteFile, timeout: aiohttp.ClientTimeout, where: _Position
) -> Iterator[None]:
    """Turn what aiohttp raises into a DownloadFailed that says what a person can do."""
    try:
        yield
    except (aiohttp.ClientError, TimeoutError) as error:
        reason = _reason(error, str(URL(remote.url).host), timeout, where)
        raise DownloadFailed(f"{remote.name}: {reason}") from error


def _reason(error: Exception, host: str, timeout: aiohttp.ClientTimeout, where: _Position) -> str:
    match error:
        case aiohttp.ClientConnectorDNSError():
            text = f"the host {error.host} is not known; is this computer online?"
        case aiohttp.ClientProxyConnectionError():
            text = f"the proxy {error.host}:{error.port} does not answer"
        case aiohttp.ClientConnectorCertificateError() | aiohttp.ClientSSLError():
            text = f"no trusted TLS connection to {error.host}:{error.port} ({error})"
        case aiohttp.ClientConnectorError():
            reason = os.strerror(error.os_error.errno or 0)
            text = f"cannot connect to {error.host}:{error.port} ({reason})"
        case aiohttp.ClientHttpProxyError():
            text = f"the proxy refused: HTTP {error.status} {error.message}"
        case aiohttp.ConnectionTimeoutError():
            text = f"{host} took no connection within {timeout.connect:g} s"
        case TimeoutError():
            text = f"{host} sent nothing for {timeout.sock_read:g} s, {where}"
        case aiohttp.InvalidURL():
            text = f"{host} leads to an address that is none"
        case _:
            text = f"the connection to {host} was lost {where}"
    return text
