"""Proxies that refuse or are not there are named, and their passwords never; https goes through one.

A person whose download fails has to learn that it is the proxy which failed, and which one: the
variable that names it may have been set by somebody else.
"""

from __future__ import annotations

import base64
import hashlib
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import trustme
from gguf_files import Tensor, write_gguf
from hub import Faults, LocalHub
from proxy import Proxy
from running import RunningDaemon
from tunnel import Tunnel

REPO, FILE = "owner/tiny", "tiny-Q4_K_M.gguf"
FAR, FAR_TLS = "http://hub.test", "https://hub.test"  # a name that nobody but the proxy knows
# The hub's library asks for the first of these, our own client for the second.
SOURCES = (f"hf:{REPO}", f"{FAR}/files/{REPO}/{FILE}")
TLS_SOURCES = (f"hf:{REPO}", f"{FAR_TLS}/files/{REPO}/{FILE}")
USER, PASSWORD = "me", "s3cret"
Start = Callable[..., RunningDaemon]


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("content") / "m.gguf"
    return write_gguf(path, tensors=[Tensor(dimensions=(256, 2048))]).read_bytes()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, Path]:
    """What the hub shows that it is hub.test, and the authority that says so."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("hub.test").configure_cert(context)
    trusted = tmp_path_factory.mktemp("authority") / "authority.pem"
    authority.cert_pem.write_to_path(str(trusted))
    return context, trusted


@pytest.fixture
def hub(content: bytes) -> Iterator[LocalHub]:
    with LocalHub(faults=Faults(redirect="none")) as running:
        running.add(REPO, {FILE: content})
        yield running


@pytest.fixture
def tls_hub(content: bytes, authority: tuple[ssl.SSLContext, Path]) -> Iterator[LocalHub]:
    with LocalHub(faults=Faults(redirect="none"), tls=authority[0]) as running:
        running.add(REPO, {FILE: content})
        yield running


def shown(address: str) -> str:
    """The proxy's address with credentials, as the environment has it."""
    return f"http://{USER}:{PASSWORD}@{address}"


def nobody() -> str:
    """The address of a port on this machine at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        return f"127.0.0.1:{held.getsockname()[1]}"


def failures(daemon: RunningDaemon, sources: Iterable[str]) -> list[str]:
    """Say what looks and downloads tell of why they fail; the downloads may go on trying."""
    told = []
    for source in sources:
        looked = daemon.command("pull", source, "--dry-run")
        assert looked.returncode == 1, looked.stdout
        body = {"source": source, "unique": f"tiny{len(told)}"}
        name = daemon.json("POST", "/modeld/v1/models", body)["unique"]
        daemon.json("POST", f"/modeld/v1/models/{name}/download")
        said, until = "", time.monotonic() + 15
        while not said:
            assert time.monotonic() < until
            time.sleep(0.05)
            job = daemon.json("GET", f"/modeld/v1/downloads/{name}")
            said = job["waiting"] or (job["error"] or {}).get("message") or ""
        daemon.command("cancel", name)  # if it goes on trying: only so many do at once
        assert not daemon.model(name)["downloaded"]
        told += [looked.stderr, said]
    assert PASSWORD not in "".join(told) + daemon.log
    return told


def test_a_proxy_that_wants_credentials_is_named(start_daemon: Start, hub: LocalHub) -> None:
    with Proxy(hub.port, answers=[407] * 100) as proxy:
        daemon = start_daemon(HF_ENDPOINT=FAR, HTTP_PROXY=shown(proxy.address))
        told = failures(daemon, SOURCES)
    assert all("407" in text and f"proxy {proxy.address}" in text for text in told), told
    assert proxy.asked and hub.requests == []


def test_a_proxy_that_makes_no_tunnels_is_named(start_daemon: Start) -> None:
    """It is not asked again and again: credentials do not come by waiting."""
    with Tunnel(0, answers=[407] * 100) as proxy:
        daemon = start_daemon(HF_ENDPOINT=FAR_TLS, HTTPS_PROXY=shown(proxy.address))
        told = failures(daemon, TLS_SOURCES)
    assert all("407" in text and f"proxy {proxy.address}" in text for text in told), told
    assert not any("trying again" in text for text in told), told
    assert set(proxy.asked) == {"hub.test:443"}


def test_a_proxy_that_is_not_there_is_named(start_daemon: Start) -> None:
    address = nobody()
    proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY"), shown(address))
    told = failures(start_daemon(HF_ENDPOINT=FAR, **proxies), [*SOURCES, TLS_SOURCES[1]])
    assert all(f"proxy {address}" in text for text in told), told


def test_https_goes_through_a_tunnel(
    start_daemon: Start,
    tls_hub: LocalHub,
    authority: tuple[ssl.SSLContext, Path],
    content: bytes,
) -> None:
    """Its server's certificate is checked as without a proxy: the name is that of the hub."""
    with Tunnel(tls_hub.port) as proxy:
        daemon = start_daemon(
            HF_ENDPOINT=FAR_TLS,
            HTTPS_PROXY=shown(proxy.address),
            SSL_CERT_FILE=str(authority[1]),
        )
        done = daemon.command("pull", TLS_SOURCES[0], "--name", "tiny")
        assert done.returncode == 0, done.stderr
    (file,) = daemon.model("tiny")["files"]
    assert hashlib.sha256(Path(file).read_bytes()).digest() == hashlib.sha256(content).digest()
    assert tls_hub.seen("/resolve/") and set(proxy.asked) == {"hub.test:443"}
    pair = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    assert proxy.credentials == {f"Basic {pair}"}
    assert PASSWORD not in daemon.log


def test_a_tunnel_to_a_server_that_nobody_vouches_for_is_not_used(
    start_daemon: Start, tls_hub: LocalHub
) -> None:
    with Tunnel(tls_hub.port) as proxy:
        daemon = start_daemon(HF_ENDPOINT=FAR_TLS, HTTPS_PROXY=shown(proxy.address))
        told = failures(daemon, TLS_SOURCES)
    assert all("certificate" in text for text in told), told
    assert not any("trying again" in text for text in told), told
    assert tls_hub.requests == []
