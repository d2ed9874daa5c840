"""The gate's two rules, as tables. A web page must never pass them; a desktop app always."""

from __future__ import annotations

import pytest

from daemon.api.gate import host_allowed, origin_allowed

PORT = 39300


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "localhost:39300",
        "LOCALHOST:39300",
        "LocalHost",
        "127.0.0.1",
        "127.0.0.1:39300",
        "127.0.0.1:1",  # the port is the connection's affair, not the name's
        "127.1.2.3:39300",
        "[::1]",
        "[::1]:39300",
        "[0:0:0:0:0:0:0:1]:39300",
    ],
)
def test_a_loopback_host_is_ours(host):
    assert host_allowed(host, ())


@pytest.mark.parametrize(
    "host",
    [
        None,
        "",
        " ",
        ":39300",
        "evil.example",
        "evil.example:39300",
        # names that resolve to loopback, or look as if they did
        "localhost.evil.com",
        "localhost.evil.com:39300",
        "evil-localhost",
        "localhost.localdomain",
        "127.0.0.1.nip.io",
        "127.0.0.1.nip.io:39300",
        "127-0-0-1.nip.io",
        "localtest.me",
        "foo.localhost.evil.com",
        "1.0.0.127.in-addr.arpa",
        # other spellings of addresses, which browsers would have normalized
        "0.0.0.0",
        "0.0.0.0:39300",
        "0",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "[::]",
        "::1",
        "[::1",
        "192.168.1.2:39300",
        "[fe80::1]",
        # userinfo, paths and the like do not belong in a Host header
        "127.0.0.1@evil.com",
        "127.0.0.1:39300@evil.com",
        "evil.com@127.0.0.1",
        "evil.com:x@localhost:39300",
        "@localhost",
        "localhost/evil.com",
        "evil.com/localhost",
        "localhost#evil.com",
        "localhost?evil.com",
        "localhost\\.evil.com",
        "localhost, evil.com",
        "localhost evil.com",
        "localhost%00.evil.com",
        "localhost:39300:39300",
        "localhost:http",
        "localhost:99999",
        "localhost:-1",
        "ⓛocalhost",
        "locaⅼhost",
    ],
)
def test_any_other_host_is_not(host):
    assert not host_allowed(host, ())


@pytest.mark.parametrize("configured", ["box.lan", "Box.LAN"])
@pytest.mark.parametrize("host", ["box.lan", "box.lan:39300", "BOX.lan:39300"])
def test_a_host_that_the_settings_name_is_allowed_in_any_case(host, configured):
    assert host_allowed(host, (configured,))


@pytest.mark.parametrize("host", ["evil.box.lan", "box.lan.evil.com", "box", "evil@box.lan"])
def test_what_only_resembles_a_host_of_the_settings_is_not(host):
    assert not host_allowed(host, ("box.lan",))


@pytest.mark.parametrize(
    "origin",
    [
        None,
        f"http://localhost:{PORT}",
        f"http://127.0.0.1:{PORT}",
        f"http://[::1]:{PORT}",
        f"HTTP://LOCALHOST:{PORT}",
        "app://obsidian.md",
        "app://-",
        "APP://obsidian.md",
        "vscode-webview://0abc123",
        "vscode-file://vscode-app",
        "tauri://localhost",
        "capacitor://localhost",
        "wails://wails",
    ],
)
def test_our_own_pages_and_desktop_apps_are_allowed(origin):
    assert origin_allowed(origin, PORT, ())


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "NULL",
        "",
        "*",
        "https://evil.example",
        "http://evil.example",
        f"http://evil.example:{PORT}",
        # another program's pages on this machine
        "http://localhost",
        "http://localhost:3000",
        "http://127.0.0.1:39301",
        f"https://localhost:{PORT}",
        f"ws://localhost:{PORT}",
        f"ftp://localhost:{PORT}",
        # names that resolve to loopback
        f"http://localhost.evil.com:{PORT}",
        f"http://127.0.0.1.nip.io:{PORT}",
        f"http://0.0.0.0:{PORT}",
        f"http://192.168.1.2:{PORT}",
        # userinfo
        f"http://127.0.0.1:{PORT}@evil.com",
        f"http://localhost:{PORT}@evil.com:{PORT}",
        f"http://localhost@evil.com:{PORT}",
        # other schemes, among them those that any extension or file can have
        "chrome-extension://abcdefghijklmnop",
        "moz-extension://0000",
        "safari-web-extension://0000",
        "file://",
        "data:",
        "blob:http://localhost:39300",
        "about:blank",
        "javascript:app://",
        "apps://x",
        "xapp://x",
        "app",
        "https://app://x",
        "//localhost",
        f"localhost:{PORT}",
        f"http://[::1:{PORT}",
        "http://localhost:http",
        f"null, http://localhost:{PORT}",
    ],
)
def test_no_other_origin_is(origin):
    assert not origin_allowed(origin, PORT, ())


def test_on_a_unix_socket_there_are_no_pages_of_our_own():
    assert not origin_allowed(f"http://localhost:{PORT}", None, ())
    assert not origin_allowed("http://localhost", None, ())
    assert origin_allowed(None, None, ())
    assert origin_allowed("app://obsidian.md", None, ())


def test_an_origin_that_the_settings_name_is_allowed_exactly():
    allowed = ("https://good.example", "chrome-extension://mine")
    assert all(origin_allowed(origin, PORT, allowed) for origin in allowed)
    for other in (
        "http://good.example",
        "https://good.example:8443",
        "https://good.example.evil.com",
        "https://sub.good.example",
        "chrome-extension://other",
    ):
        assert not origin_allowed(other, PORT, allowed)
