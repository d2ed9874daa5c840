"""A child that gets one order from the daemon, answers it and exits: a fetcher or a peeker.

Owns the conversation with the daemon, that no token gets into an answer, and the way from a source
on the network to the files that it means. Everything heavy is imported after the process is tied to
its parent.
"""

from __future__ import annotations

import argparse
import os
import queue
import sys
import threading
import traceback
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from urllib.parse import urlsplit

import msgspec

from backends import child, wire
from daemon import sources
from daemon.errors import DownloadFailed, ModeldError

if TYPE_CHECKING:
    from daemon.downloads.hub import Resolved
    from daemon.downloads.ranged import Timeouts

First = TypeVar("First", bound=msgspec.Struct)
Answer = TypeVar("Answer", bound=msgspec.Struct)

Send = Callable[[msgspec.Struct], None]
Orders = queue.SimpleQueue[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Order(Generic[First]):
    """What the daemon wants of this child, and what the child has for that.

    `later` gets what the daemon says after `first`. `timeouts` are from the command line, `token`
    is the user's (empty for none), and `send` sends messages before the answer.
    """

    first: First
    later: Orders
    timeouts: Timeouts
    token: str
    send: Send


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """How this child may use the network: the settings' hub, the user's token, its patience.

    An empty `hub_endpoint` is the public hub; `memory_bytes` is as for `hub.Hub`.
    """

    hub_endpoint: str
    offline: bool
    timeouts: Timeouts
    token: str
    memory_bytes: int = 0

    def locate(self, source: sources.UrlSource | sources.HubSource) -> Resolved:
        """Return the files that `source` means. Raises InvalidRequest and DownloadFailed."""
        if self.offline:
            raise DownloadFailed(
                "modeld is set to stay offline, so nothing is downloaded; "
                "files on this machine can still be imported"
            )
        _check_proxies()
        from daemon.downloads import hub, ranged

        if isinstance(source, sources.UrlSource):
            return hub.Resolved(commit="", files=(ranged.from_url(source),))
        where = hub.Hub(
            endpoint=(self.hub_endpoint or hub.PUBLIC).rstrip("/"),
            token=self.token,
            timeout_s=self.timeouts.connect_s,
            memory_bytes=self.memory_bytes,
        )
        return where.resolve(source)


def run(orders: Any, work: Callable[[Order[Any]], msgspec.Struct], *, what: str) -> None:
    """Do the `work` that the daemon orders, answer, and exit.

    `orders` is the type of what it may say. Messages call the work `what`.
    """
    channel, arguments = child.attach(orders)
    # Only HF_TOKEN and what stands in a URL authorise: a netrc entry would go out as well, to
    # every host that a redirect leads to.
    os.environ["NETRC"] = os.devnull
    _spread_all_proxy()
    inbox: Orders = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(channel, inbox), daemon=True).start()
    send = _sender(channel)
    token = os.environ.get("HF_TOKEN", "").strip()
    order = Order(
        first=inbox.get(), later=inbox, timeouts=_timeouts(arguments), token=token, send=send
    )
    send(attempt(lambda: work(order), token, what))
    sys.stderr.flush()
    os._exit(0)  # the listening thread is inside a read, which a normal exit would wait for


def _spread_all_proxy() -> None:
    """Let ALL_PROXY be the proxy of both schemes, unless they have one: not all libraries do."""
    proxies = urllib.request.getproxies()
    for scheme in ("http", "https"):
        if "all" in proxies and scheme not in proxies:
            os.environ[f"{scheme}_proxy"] = proxies["all"]


def _check_proxies() -> None:
    """Raise DownloadFailed for a proxy that is not asked in HTTP: it would be passed over."""
    for scheme, address in urllib.request.getproxies().items():
        parts = urlsplit(address if "://" in address else f"http://{address}")
        if scheme in ("http", "https") and parts.scheme != "http":
            raise DownloadFailed(
                f"the proxy for {scheme} is {parts.scheme}://{parts.hostname}, and modeld can ask "
                "only proxies whose address begins with http://: set the variable "
                f"{scheme.upper()}_PROXY to such a one, or unset it"
            )


def attempt(work: Callable[[], Answer], token: str, what: str) -> Answer | wire.Error:
    """Return what became of the work. Never raises; no message or trace shows `token`."""

    def hidden(text: str) -> str:
        return text.replace(token, "[HF_TOKEN]") if token else text

    try:
        return work()
    except ModeldError as error:
        return wire.Error(code=error.code, message=hidden(error.message))
    except Exception as error:  # noqa: BLE001 - whatever it is, the daemon is owed an answer
        # The daemon's log gets the trace; the user gets what the system said.
        sys.stderr.write(hidden(traceback.format_exc()))
        reason = str(error) or type(error).__name__
        return wire.Error(code="download_failed", message=hidden(f"{what} stopped: {reason}"))


def _listen(channel: child.Channel, inbox: Orders) -> None:
    """Take the order, and end the process as soon as nobody waits for it any more."""
    status = 0
    try:
        for message in channel.receive():
            inbox.put(message)
    except (OSError, wire.ProtocolError):
        traceback.print_exc()
        status = 1
    os._exit(status)


def _sender(channel: child.Channel) -> Send:
    def send(message: msgspec.Struct) -> None:
        try:
            channel.send(message)
        except OSError:
            os._exit(0)  # the daemon is gone, or wants nothing of this any more

    return send


def _timeouts(arguments: Sequence[str]) -> Timeouts:
    from daemon.downloads.ranged import Timeouts

    parser = argparse.ArgumentParser()
    parser.add_argument("--connect-timeout-s", type=float, default=Timeouts().connect_s)
    parser.add_argument("--stall-timeout-s", type=float, default=Timeouts().stall_s)
    parser.add_argument("--patience-s", type=float, default=Timeouts().patience_s)
    parser.add_argument("--first-patience-s", type=float, default=Timeouts().first_patience_s)
    options = parser.parse_args(arguments)
    return Timeouts(
        connect_s=options.connect_timeout_s,
        stall_s=options.stall_timeout_s,
        patience_s=options.patience_s,
        first_patience_s=options.first_patience_s,
    )
