"""Where the daemon listens and how its clients find it."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from daemon.errors import ConfigError

PORTS = range(39300, 39334)  # where current Pieces clients look
_BACKLOG = 512


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A host and a port; port 0 is any free one."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A socket file."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


Address = TcpAddress | UnixAddress


def parse(text: str) -> Address:
    """Return the address in `host:port`, `[v6]:port`, `http://host:port` or `unix:/path`.

    Raises ConfigError.
    """
    if text.startswith("unix:"):
        path = text.removeprefix("unix:").removeprefix("//")
        if not path.startswith("/"):
            raise ConfigError(f"listen address {text!r}: a unix socket needs an absolute path")
        return UnixAddress(path)
    host, _, port = text.removeprefix("http://").rstrip("/").rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"address {text!r} is neither host:port nor unix:/path")
    return TcpAddress(host.removeprefix("[").removesuffix("]"), int(port))


def refuse_unless_local(address: Address) -> None:
    """Raise ConfigError for an address that other machines could reach."""
    if isinstance(address, UnixAddress) or address.host == "localhost":
        return
    try:
        local = ip_address(address.host).is_loopback
    except ValueError:
        local = False
    if not local:
        raise ConfigError(
            f"{address} can be reached from other machines, which modeld does not allow: listen on "
            "127.0.0.1, ::1 or a unix socket"
        )


def bind(listen: Sequence[str]) -> list[socket.socket]:
    """Return listening sockets for `listen`, or for the first free port of 39300-39333.

    Raises ConfigError that names the address which can't be used, and closes the others.
    """
    addresses = [parse(text) for text in listen]
    for address in addresses:
        refuse_unless_local(address)
    if not addresses:
        return [_first_free()]
    sockets: list[socket.socket] = []
    try:
        for address in addresses:
            sockets.append(_bind_one(address))  # noqa: PERF401  those opened so far must be closed
    except BaseException:
        for opened in sockets:
            opened.close()
        raise
    return sockets


def _first_free() -> socket.socket:
    for port in PORTS:
        try:
            return _tcp(TcpAddress("127.0.0.1", port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise ConfigError(f"cannot listen on 127.0.0.1:{port}: {error.strerror}") from error
    raise ConfigError(
        f"every port from {PORTS[0]} to {PORTS[-1]} is in use: choose another with --listen"
    )


def _bind_one(address: Address) -> socket.socket:
    try:
        return _unix(address) if isinstance(address, UnixAddress) else _tcp(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"{address} is in use by another program: stop it or choose another address with "
                "--listen"
            ) from error
        raise ConfigError(f"cannot listen on {address}: {error.strerror or error}") from error


def _tcp(address: TcpAddress) -> socket.socket:
    family, kind, protocol, _, where = socket.getaddrinfo(
        address.host, address.port, type=socket.SOCK_STREAM
    )[0]
    opened = socket.socket(family, kind, protocol)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(where)
        opened.listen(_BACKLOG)
    except BaseException:
        opened.close()
        raise
    return opened


def _unix(address: UnixAddress) -> socket.socket:
    """Listen on a socket file for this user alone; one that a dead daemon left is replaced."""
    opened = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if _is_dead_socket(address.path):
            Path(address.path).unlink()
        mask = os.umask(0o177)
        try:
            opened.bind(address.path)
        finally:
            os.umask(mask)
        opened.listen(_BACKLOG)
    except BaseException:
        opened.close()
        raise
    return opened


def _is_dead_socket(path: str) -> bool:
    try:
        if not stat.S_ISSOCK(Path(path).stat().st_mode):
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.connect(path)
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def address_of(opened: socket.socket) -> Address:
    """Return the address that a listening socket has."""
    name = opened.getsockname()
    return UnixAddress(name) if isinstance(name, str) else TcpAddress(name[0], name[1])


def address_file(environment: Mapping[str, str]) -> Path | None:
    """Return where this daemon writes the address that it is at.

    systemd gives a service RUNTIME_DIRECTORY; a user's session has XDG_RUNTIME_DIR.
    """
    if directory := environment.get("RUNTIME_DIRECTORY"):
        return Path(directory) / "address"
    if directory := environment.get("XDG_RUNTIME_DIR"):
        return Path(directory) / "modeld" / "address"
    return Path("/run/modeld/address") if os.geteuid() == 0 else None


def candidates(environment: Mapping[str, str]) -> Iterator[Address]:
    """Yield where a client should look for the daemon, the best guess first. Raises ConfigError."""
    if host := environment.get("MODELD_HOST"):
        yield parse(host)
        return
    runtime = environment.get("XDG_RUNTIME_DIR")
    files = [Path(runtime) / "modeld" / "address"] if runtime else []
    for file in (*files, Path("/run/modeld/address")):
        try:
            yield parse(file.read_text(encoding="utf-8").split("\n")[0])
        except (OSError, UnicodeDecodeError, ConfigError):
            continue
    yield from (TcpAddress("127.0.0.1", port) for port in PORTS)
