"""Who may talk to the daemon: a Host check and an Origin allow-list before every request.

Any web page can send requests to loopback addresses. The Host check stops a page whose own name was
re-bound to such an address; the Origin check stops all other pages. Both rules are pure functions.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, Collection
from urllib.parse import urlsplit

from aiohttp import hdrs, web
from aiohttp.typedefs import Middleware

from daemon.errors import Forbidden

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

# Schemes whose pages only a desktop app can make: no web site can have such an origin.
APP_SCHEMES = frozenset({"app", "capacitor", "tauri", "vscode-file", "vscode-webview", "wails"})
_ALLOWED_METHODS = "GET, HEAD, POST, PATCH, DELETE, OPTIONS"
# Headers of answers, besides the usual ones, that pages may read.
_EXPOSED = "Retry-After, x-should-retry, X-Modeld-Notice"


def host_name(host: str) -> str | None:
    """Return the name in a Host header, in lower case and without its port; None if malformed."""
    try:
        parts = urlsplit(f"//{host}")
        parts.port  # noqa: B018  raises for a port that is no number
    except ValueError:
        return None
    if parts.username is not None or parts.path or parts.query or parts.fragment:
        return None
    return parts.hostname


def is_loopback(name: str) -> bool:
    """Say whether `name` is `localhost` or a loopback address; no other name is trusted."""
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def host_allowed(host: str | None, allowed_hosts: Collection[str]) -> bool:
    """Say whether a request with this Host header is meant for this daemon."""
    name = host_name(host) if host else None
    return name is not None and (
        is_loopback(name) or name in {allowed.lower() for allowed in allowed_hosts}
    )


def origin_allowed(origin: str | None, port: int | None, allowed_origins: Collection[str]) -> bool:
    """Say whether a page of `origin` may use the daemon that listens on `port`.

    Allowed are: no origin (not a browser), our own, those of desktop apps, and those in
    `allowed_origins`. Never `null`, which any page can have for the asking.
    """
    if origin is None or origin in allowed_origins:
        return True
    try:
        parts = urlsplit(origin)
        origin_port = parts.port
    except ValueError:
        return False
    if parts.scheme in APP_SCHEMES:
        return True
    own = port is not None and origin_port == port and parts.scheme == "http"
    return own and parts.hostname is not None and is_loopback(parts.hostname)


def fetch_allowed(site: str | None, mode: str | None) -> bool:
    """Say whether a request without an Origin may pass, by its Sec-Fetch-Site and -Mode headers.

    Browsers leave the Origin out of simple GETs, such as those of images and scripts, but say where
    those come from. A user who follows a link to this daemon navigates, and may.
    """
    return site in (None, "none", "same-origin") or mode == "navigate"


def _port(request: web.Request) -> int | None:
    """Return the TCP port that the request came in on; None for a unix socket."""
    address = request.transport.get_extra_info("sockname") if request.transport else None
    return address[1] if isinstance(address, tuple) else None


def gate(allowed_hosts: Collection[str], allowed_origins: Collection[str]) -> Middleware:
    """Return the middleware that lets nothing pass but what both rules allow.

    It answers CORS preflights of allowed origins itself.
    """

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        host = request.headers.get(hdrs.HOST)
        if not host_allowed(host, allowed_hosts):
            raise Forbidden(
                f"this daemon does not answer to the host name {host!r}; if it should, add it to "
                "[server] allowed_hosts"
            )
        origin = request.headers.get(hdrs.ORIGIN)
        if not origin_allowed(origin, _port(request), allowed_origins):
            raise Forbidden(
                f"pages of {origin!r} may not use this daemon; if they should, add that origin to "
                "[server] allowed_origins"
            )
        site, mode = request.headers.get("Sec-Fetch-Site"), request.headers.get("Sec-Fetch-Mode")
        if origin is None and not fetch_allowed(site, mode):
            raise Forbidden("pages of other sites may not use this daemon")
        is_preflight = hdrs.ACCESS_CONTROL_REQUEST_METHOD in request.headers
        if request.method == hdrs.METH_OPTIONS and origin and is_preflight:
            return _preflight(request)
        return await handler(request)

    return middleware


def _preflight(request: web.Request) -> web.Response:
    wanted = request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_HEADERS, "")
    headers: dict[str, str] = {
        hdrs.ACCESS_CONTROL_ALLOW_METHODS: _ALLOWED_METHODS,
        hdrs.ACCESS_CONTROL_ALLOW_HEADERS: wanted,
        hdrs.ACCESS_CONTROL_MAX_AGE: "600",
    }
    if "Access-Control-Request-Private-Network" in request.headers:
        headers["Access-Control-Allow-Private-Network"] = "true"
    return web.Response(status=204, headers=headers)


def allow_reading(
    allowed_origins: Collection[str],
) -> Callable[[web.Request, web.StreamResponse], Awaitable[None]]:
    """Return the signal handler that lets pages of allowed origins read the answer."""

    async def on_prepare(request: web.Request, response: web.StreamResponse) -> None:
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is not None and origin_allowed(origin, _port(request), allowed_origins):
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = origin
            response.headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = _EXPOSED
            response.headers[hdrs.VARY] = hdrs.ORIGIN

    return on_prepare
