"""Where a redirect leads, and what may be shown there. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from yarl import URL

from daemon.errors import DownloadFailed

MAX_REDIRECTS = 10
_CREDENTIALS = frozenset({"authorization", "cookie"})


def follow(url: URL, target: str, name: str) -> URL:
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


def shown(headers: Mapping[str, str], here: URL, there: URL) -> dict[str, str]:
    """Return those of the `headers` for `here` that may be sent `there` too."""
    kept = _same_origin(here, there)
    return {k: v for k, v in headers.items() if kept or k.lower() not in _CREDENTIALS}
