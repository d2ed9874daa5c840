"""Where the daemon listens, whom that lets in, and how clients find it."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from daemon import addresses
from daemon.addresses import TcpAddress, UnixAddress
from daemon.errors import ConfigError


@pytest.fixture
def bind() -> Iterator[Callable[..., list[socket.socket]]]:
    """`addresses.bind(texts)`, whose sockets are closed after the test."""
    with contextlib.ExitStack() as opened:

        def open_all(*listen: str) -> list[socket.socket]:
            return [opened.enter_context(sock) for sock in addresses.bind(listen)]

        yield open_all


@pytest.fixture
def ports(monkeypatch: pytest.MonkeyPatch) -> range:
    """Three neighbouring free ports, which stand in for 39300-39333."""
    for base in range(20000, 30000, 7):
        candidate = range(base, base + 3)
        if all(is_free(port) for port in candidate):
            monkeypatch.setattr(addresses, "PORTS", candidate)
            return candidate
    raise AssertionError("no free ports")


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def port_of(opened: socket.socket) -> int:
    return opened.getsockname()[1]


# parsing


@pytest.mark.parametrize(
    ("text", "address", "shown"),
    [
        ("127.0.0.1:1000", TcpAddress("127.0.0.1", 1000), "http://127.0.0.1:1000"),
        ("localhost:0", TcpAddress("localhost", 0), "http://localhost:0"),
        ("[::1]:5323", TcpAddress("::1", 5323), "http://[::1]:5323"),
        ("http://127.0.0.1:1000", TcpAddress("127.0.0.1", 1000), "http://127.0.0.1:1000"),
        ("http://[::1]:65535/", TcpAddress("::1", 65535), "http://[::1]:65535"),
        ("unix:/run/m.sock", UnixAddress("/run/m.sock"), "unix:/run/m.sock"),
        ("unix:///run/m.sock", UnixAddress("/run/m.sock"), "unix:/run/m.sock"),
    ],
)
def test_an_address_is_read_and_its_text_reads_back(text, address, shown):
    assert addresses.parse(text) == address
    assert str(address) == shown
    assert addresses.parse(shown) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        "127.0.0.1",
        "localhost",
        ":1000",
        "127.0.0.1:",
        "127.0.0.1:http",
        "127.0.0.1:-1",
        "127.0.0.1:65536",
        "127.0.0.1:1000/path",
        "unix:relative.sock",
        "unix:",
    ],
)
def test_what_is_no_address_is_refused_as_it_was_written(text):
    with pytest.raises(ConfigError) as error:
        addresses.parse(text)
    assert repr(text) in error.value.message


# who could reach it


@pytest.mark.parametrize(
    "text",
    [
        "0.0.0.0:1000",
        "[::]:1000",
        "0:1000",
        "192.168.1.2:1000",
        "10.0.0.1:1000",
        "[fe80::1]:1000",
        "[::ffff:192.168.1.2]:1000",
        "8.8.8.8:1000",
        "modeld.example:1000",
        "localhost.evil.example:1000",
        "127.0.0.1.nip.io:1000",
        "*:1000",
    ],
)
def test_an_address_that_others_could_reach_is_refused_before_anything_opens(bind, ports, text):
    first = f"127.0.0.1:{ports[0]}"
    with pytest.raises(ConfigError, match="other machines"):
        bind(first, text)
    assert is_free(ports[0])


@pytest.mark.parametrize(
    "text", ["127.0.0.1:1", "127.8.9.10:1", "localhost:1", "[::1]:1", "unix:/m.sock"]
)
def test_an_address_of_this_machine_alone_is_fine(text):
    addresses.refuse_unless_local(addresses.parse(text))


# TCP


def test_the_default_ports_are_where_pieces_clients_look():
    assert list(addresses.PORTS) == list(range(39300, 39334))


def test_without_an_address_the_first_free_port_is_taken(bind, ports):
    (first,) = bind()
    assert first.getsockname() == ("127.0.0.1", ports[0])
    (second,) = bind()
    assert second.getsockname() == ("127.0.0.1", ports[1])
    first.close()
    (again,) = bind()
    assert port_of(again) == ports[0]


def test_when_all_of_them_are_taken_it_says_what_to_do(bind, ports):
    for _ in ports:
        bind()
    with pytest.raises(ConfigError, match=f"{ports[0]} to {ports[-1]} is in use.*--listen"):
        bind()


def test_an_address_that_is_given_replaces_the_default_ports(bind, ports):
    bind("127.0.0.1:0")
    assert all(is_free(port) for port in ports)


def test_several_addresses_may_be_given(bind, tmp_path):
    one, two, three = bind("127.0.0.1:0", "localhost:0", f"unix:{tmp_path / 'm.sock'}")
    assert addresses.address_of(one) == TcpAddress("127.0.0.1", port_of(one))
    assert port_of(one) != port_of(two)
    assert addresses.address_of(three) == UnixAddress(str(tmp_path / "m.sock"))
    for sock in (one, two, three):
        with socket.socket(sock.family) as client:
            client.settimeout(5)
            client.connect(sock.getsockname())


def test_an_address_in_use_is_named_and_the_others_are_let_go(bind, ports):
    bind(f"127.0.0.1:{ports[1]}")
    with pytest.raises(ConfigError, match=f"http://127.0.0.1:{ports[1]} is in use.*--listen"):
        bind(f"127.0.0.1:{ports[0]}", f"127.0.0.1:{ports[1]}")
    assert is_free(ports[0])


# unix sockets


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "m.sock"


def test_a_unix_socket_is_for_this_user_alone(bind, path):
    before = os.umask(0)
    try:
        bind(f"unix:{path}")
        assert os.umask(0) == 0, "the process's own umask was changed"
    finally:
        os.umask(before)
    assert stat.S_ISSOCK(path.stat().st_mode)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_socket_file_of_a_dead_daemon_is_replaced(bind, path):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()
    assert path.exists()
    (ours,) = bind(f"unix:{path}")
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        client.connect(str(path))
        accepted, _ = ours.accept()
        accepted.close()


def test_the_socket_file_of_a_live_daemon_is_left_alone(bind, path):
    with socket.socket(socket.AF_UNIX) as live:
        live.bind(str(path))
        live.listen()
        with pytest.raises(ConfigError, match="is in use by another program"):
            bind(f"unix:{path}")
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(5)
            client.connect(str(path))  # it is still that one


def test_a_file_that_is_no_socket_is_never_removed(bind, path):
    path.write_text("precious")
    with pytest.raises(ConfigError, match=r"m\.sock"):
        bind(f"unix:{path}")
    assert path.read_text() == "precious"


@pytest.mark.parametrize("name", ["missing/m.sock", "x" * 200])
def test_a_path_where_no_socket_can_be_is_named(bind, tmp_path, name):
    with pytest.raises(ConfigError) as error:
        bind(f"unix:{tmp_path}/{name}")
    assert f"cannot listen on unix:{tmp_path}/{name}" in error.value.message


# being found


def test_modeld_host_is_the_only_place_to_look_when_it_is_set(tmp_path):
    environment = {"MODELD_HOST": "127.0.0.1:11434", "XDG_RUNTIME_DIR": str(tmp_path)}
    assert list(addresses.candidates(environment)) == [TcpAddress("127.0.0.1", 11434)]


def test_a_wrong_modeld_host_is_an_error():
    with pytest.raises(ConfigError, match="nonsense"):
        list(addresses.candidates({"MODELD_HOST": "nonsense"}))


def test_the_user_s_daemon_comes_first_then_the_system_s_then_the_ports(tmp_path):
    address = tmp_path / "modeld" / "address"
    address.parent.mkdir()
    address.write_text("http://127.0.0.1:39305\nunix:/run/user/m.sock\n")
    found = list(addresses.candidates({"XDG_RUNTIME_DIR": str(tmp_path)}))
    assert found[0] == TcpAddress("127.0.0.1", 39305)
    assert found[-34:] == [TcpAddress("127.0.0.1", port) for port in range(39300, 39334)]
    assert len(found) <= 1 + 1 + 34  # a system service may run on this machine


@pytest.mark.parametrize("content", [None, b"", b"\n", b"nonsense\n", b"\xff\xfe\x00"])
def test_an_address_file_that_says_nothing_is_passed_over(tmp_path, content):
    if content is not None:
        (tmp_path / "modeld").mkdir()
        (tmp_path / "modeld" / "address").write_bytes(content)
    environment = {"XDG_RUNTIME_DIR": str(tmp_path)}
    assert list(addresses.candidates(environment)) == list(addresses.candidates({}))


def test_the_address_file_is_in_the_runtime_directory_of_the_service_or_the_user():
    user, service = {"XDG_RUNTIME_DIR": "/run/user/7"}, {"RUNTIME_DIRECTORY": "/run/modeld"}
    assert addresses.address_file(user) == Path("/run/user/7/modeld/address")
    assert addresses.address_file(service) == Path("/run/modeld/address")
    assert addresses.address_file(user | service) == Path("/run/modeld/address")
