"""What goes wrong between this computer and a file on the network, in words.

Owns the messages alone: who asks and for what is `ranged`.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

import aiohttp
from yarl import URL

from daemon.downloads.pace import Patience
from daemon.errors import DownloadFailed

# Statuses that may be others soon. What a delivery network answers while it can't reach the server
# behind it has no place in RFC 9110:
# https://developers.cloudflare.com/support/troubleshooting/http-status-codes/cloudflare-5xx-errors/
_LATER = frozenset({408, 425, 429, 500, 502, 503, 504, *range(520, 525)})
_TOO_MUCH = frozenset({429, 503})
_USED_UP = re.compile(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d+)")


class Unsteady(DownloadFailed):
    """What went wrong may go right in a while.

    `after_s` is when the server wants to be asked again, if it said so; `too_much`: it was asked
    too much.
    """

    def __init__(
        self, message: str, *, after_s: float | None = None, too_much: bool = False
    ) -> None:
        super().__init__(message)
        self.after_s = after_s
        self.too_much = too_much


class NoSuchRange(DownloadFailed):
    """The server's file ends before the part that was asked for (HTTP 416)."""


@dataclass(slots=True, kw_only=True)
class Position:
    """How far a transfer is; reads as `after 1,000 bytes of 2,000`."""

    at: int
    end: int | None

    def __str__(self) -> str:
        return f"after {self.at:,} bytes" + (f" of {self.end:,}" if self.end is not None else "")


def refusal(response: aiohttp.ClientResponse, name: str) -> DownloadFailed:
    """Return the error for a server's answer without the file."""
    text = _meaning(response, name)
    if response.status == 416:
        return NoSuchRange(text)
    if response.status in _LATER:
        after_s = told_to_wait_s(response.headers)
        return Unsteady(text, after_s=after_s, too_much=response.status in _TOO_MUCH)
    return DownloadFailed(text)


def may_pass(status: int) -> bool:
    """Say whether the same request may soon be answered otherwise than with this HTTP status."""
    return status in _LATER


def next_try(error: Unsteady, patience: Patience) -> tuple[float, str]:
    """Return in how many seconds to try again, and words for that.

    Raises DownloadFailed once that was tried for long enough.
    """
    wait_s = patience.wait_s(error.after_s)
    if wait_s is None:
        raise DownloadFailed(error.message) from error
    return wait_s, f"{error.message}; trying again in {math.ceil(wait_s)} s"


def proxy_for(url: str) -> str:
    """Return the host and port of the proxy that is asked for `url`, "" if none is.

    Without its credentials: this is for messages.
    """
    asked = urlsplit(url)
    address = urllib.request.getproxies().get(asked.scheme, "")
    if not address or urllib.request.proxy_bypass(asked.hostname or ""):
        return ""
    proxy = urlsplit(address if "://" in address else f"http://{address}")
    return f"{proxy.hostname}:{proxy.port or 80}"


def wants_credentials(url: str) -> str:
    """Return what the HTTP status 407 means for whoever asked for `url`."""
    return (
        f"the proxy {proxy_for(url)} wants a user and a password, or others (HTTP 407): set them "
        f"in {urlsplit(url).scheme.upper()}_PROXY, as http://USER:PASSWORD@HOST:PORT"
    )


def told_to_wait_s(headers: Mapping[str, str]) -> float | None:
    """Return after how many seconds a server that refused wants to be asked again, if it says so.

    That is Retry-After (RFC 9110, section 10.2.3), else the end of a used-up quota in RateLimit
    (draft-ietf-httpapi-ratelimit-headers), as hubs send it. Names of `headers` have any case.
    """
    text = headers.get("Retry-After")
    if text is None:
        used_up = _USED_UP.search(headers.get("RateLimit", ""))
        return float(used_up[1]) if used_up else None
    if text.strip().isdecimal():
        return float(text)
    try:
        when = parsedate_to_datetime(text)
    except ValueError:
        return None
    return max(0.0, when.timestamp() - time.time())


def _meaning(response: aiohttp.ClientResponse, name: str) -> str:
    said = f"{response.url.host} answered HTTP {response.status} {response.reason} for {name}"
    match response.status:
        case 401 | 403:
            return f"{said}: it may be read only by those whom its owner allows to"
        case 407:
            return f"{name}: {wants_credentials(str(response.url))}"
        case 429:
            return f"{said}: it limits how often it is asked; try again later"
        case 416:
            return f"{said}: the file is empty or shorter than expected"
    return said


@contextlib.contextmanager
def explained(
    name: str, url: str, timeout: aiohttp.ClientTimeout, where: Position
) -> Iterator[None]:
    """Turn what aiohttp raises into a DownloadFailed that says what a person can do.

    `name` is the file's, `url` where it was asked for.
    """
    try:
        yield
    except (aiohttp.ClientError, TimeoutError) as error:
        reason = _reason(error, url, timeout, where)
        lasting = (
            aiohttp.ClientConnectorCertificateError,
            aiohttp.ClientSSLError,
            aiohttp.ClientHttpProxyError,
            aiohttp.InvalidURL,
        )
        # A proxy, too, may be overloaded, or not reach the server for a while.
        passing = isinstance(error, aiohttp.ClientHttpProxyError) and may_pass(error.status)
        kind = DownloadFailed if isinstance(error, lasting) and not passing else Unsteady
        raise kind(f"{name}: {reason}") from error


def _reason(error: Exception, url: str, timeout: aiohttp.ClientTimeout, where: Position) -> str:
    host = URL(url).host
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
        case aiohttp.ClientHttpProxyError(status=407):
            text = wants_credentials(url)
        case aiohttp.ClientHttpProxyError():
            text = f"the proxy {proxy_for(url)} refused: HTTP {error.status} {error.message}"
        case aiohttp.ConnectionTimeoutError():
            text = f"{host} took no connection within {timeout.connect:g} s"
        case TimeoutError():
            text = f"{host} sent nothing for {timeout.sock_read:g} s, {where}"
        case aiohttp.InvalidURL():
            text = f"{host} leads to an address that is none"
        case _:
            text = f"the connection to {host} was lost {where}"
    return text
