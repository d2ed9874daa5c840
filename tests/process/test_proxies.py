"""Downloads through a proxy: it is asked where the environment says so, and named if it fails."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from gguf_files import Tensor, write_gguf
from hub import Faults, LocalHub
from proxy import Proxy
from running import RunningDaemon

REPO = "owner/tiny"
FAR = "http://hub.test"  # a name that nobody but the proxy knows
Start = Callable[..., RunningDaemon]


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    return write_gguf(tmp_path / "m.gguf", tensors=[Tensor(dimensions=(256, 2048))]).read_bytes()


@pytest.fixture
def hub(content: bytes) -> Iterator[LocalHub]:
    with LocalHub(faults=Faults(redirect="none")) as running:
        running.add(REPO, {"tiny-Q4_K_M.gguf": content})
        yield running


@pytest.fixture
def proxy(hub: LocalHub) -> Iterator[Proxy]:
    with Proxy(hub.port) as running:
        yield running


def pulled(daemon: RunningDaemon, content: bytes) -> bool:
    """Pull the model; say whether it is here as it should be."""
    done = daemon.command("pull", f"hf:{REPO}", "--name", "tiny")
    assert done.returncode == 0, done.stderr
    (file,) = daemon.model("tiny")["files"]
    return hashlib.sha256(Path(file).read_bytes()).digest() == hashlib.sha256(content).digest()


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_a_proxy_of_the_environment_is_asked(
    start_daemon: Start, hub: LocalHub, proxy: Proxy, content: bytes, variable: str
) -> None:
    extra = {variable: f"http://me:s3cret@{proxy.address}"}
    daemon = start_daemon(HF_ENDPOINT=FAR, **extra)

    assert pulled(daemon, content)

    assert len(proxy.asked) >= len(hub.requests) > 1
    assert all(address.startswith(f"{FAR}/") for address in proxy.asked)
    assert proxy.credentials == {f"Basic {base64.b64encode(b'me:s3cret').decode()}"}
    assert "s3cret" not in daemon.log


def test_what_no_proxy_names_is_asked_without(
    start_daemon: Start, hub: LocalHub, proxy: Proxy, content: bytes
) -> None:
    daemon = start_daemon(
        HF_ENDPOINT=hub.url, HTTP_PROXY=f"http://{proxy.address}", NO_PROXY="127.0.0.1,localhost"
    )
    assert pulled(daemon, content) and proxy.asked == []


def test_what_a_proxy_can_t_do_just_now_is_asked_again(
    start_daemon: Start, proxy: Proxy, content: bytes
) -> None:
    proxy.answers = [503]
    daemon = start_daemon(HF_ENDPOINT=FAR, HTTP_PROXY=f"http://{proxy.address}")
    assert pulled(daemon, content)
    assert proxy.answers == []


@pytest.mark.parametrize("scheme", ["socks5", "https"])
def test_a_proxy_that_cannot_be_asked_is_refused_by_name(
    start_daemon: Start, hub: LocalHub, scheme: str
) -> None:
    daemon = start_daemon(HF_ENDPOINT=FAR, HTTP_PROXY=f"{scheme}://me:s3cret@gate.test:1080")
    refused = daemon.command("pull", f"hf:{REPO}", "--name", "tiny")
    assert refused.returncode == 1 and f"{scheme}://gate.test" in refused.stderr
    assert "HTTP_PROXY" in refused.stderr and "s3cret" not in refused.stderr + daemon.log
    assert hub.requests == []
