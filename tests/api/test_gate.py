"""Nothing passes the gate but what its two rules allow, on every surface and for every method."""

from __future__ import annotations

import pytest
from aiohttp import WSServerHandshakeError

from daemon.config import Config, Server

PATHS = [
    ("GET", "/models"),
    ("POST", "/models/create"),
    ("GET", "/.well-known/health"),
    ("HEAD", "/.well-known/health"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/modeld/v1/models"),
    ("DELETE", "/modeld/v1/models/x"),
    ("GET", "/health"),
    ("GET", "/nothing/at/all"),
    ("OPTIONS", "/models"),
]


@pytest.mark.parametrize(("method", "path"), PATHS)
async def test_a_foreign_host_or_origin_is_refused_everywhere(client, method, path):
    for headers in (
        {"Host": "evil.example"},
        {"Host": f"evil.example:{client.port}"},
        {"Host": "localhost.evil.example"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:1"},
        {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
        {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors"},
    ):
        response = await client.request(method, path, headers=headers)
        assert response.status == 403, headers
        assert "Access-Control-Allow-Origin" not in response.headers


async def test_the_refusal_says_which_setting_would_allow_it(client):
    response = await client.get("/models", headers={"Origin": "https://evil.example"})
    assert "allowed_origins" in await response.text()
    assert response.content_type == "text/plain"
    response = await client.get("/v1/models", headers={"Host": "evil.example"})
    error = (await response.json())["error"]
    assert error["code"] == "forbidden_origin" and "allowed_hosts" in error["message"]


@pytest.mark.parametrize(
    "path",
    ["/models/stream/identifiers", "/.well-known/stream/health", "/model/x/download/progress"],
)
async def test_web_sockets_are_refused_at_the_handshake(client, path):
    for headers in ({"Origin": "https://evil.example"}, {"Host": "evil.example"}):
        with pytest.raises(WSServerHandshakeError) as refused:
            await client.ws_connect(path, headers=headers)
        assert refused.value.status == 403


async def test_our_own_pages_and_desktop_apps_may_pass_and_read(client):
    for origin in (
        f"http://127.0.0.1:{client.port}",
        f"http://localhost:{client.port}",
        "app://obsidian.md",
        "vscode-webview://0abc",
        "tauri://localhost",
    ):
        response = await client.get("/models", headers={"Origin": origin})
        assert response.status == 200
        assert response.headers["Access-Control-Allow-Origin"] == origin
        assert response.headers["Vary"] == "Origin"
        exposed = response.headers["Access-Control-Expose-Headers"].split(", ")
        assert {"Retry-After", "x-should-retry", "X-Modeld-Notice"} <= set(exposed)
        preflight = await client.options(
            "/model/update",
            headers={
                "Origin": origin,
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "content-type",
            },
        )
        assert preflight.status == 204
        assert preflight.headers["Access-Control-Allow-Headers"] == "content-type"
        allowed = preflight.headers["Access-Control-Allow-Methods"].split(", ")
        assert {"GET", "POST", "PATCH", "DELETE"} <= set(allowed)


async def test_a_link_that_the_user_follows_may_pass(client):
    headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert (await client.get("/health", headers=headers)).status == 200


async def test_no_origin_is_no_browser(client):
    response = await client.get("/models")
    assert response.status == 200 and "Access-Control-Allow-Origin" not in response.headers


@pytest.mark.parametrize(
    "config",
    [Config(server=Server(allowed_origins=("https://good.example",), allowed_hosts=("box.lan",)))],
)
async def test_what_the_settings_name_may_pass(client):
    allowed = {"Origin": "https://good.example", "Host": "box.lan:1000"}
    assert (await client.get("/models", headers=allowed)).status == 200
    refused = {"Origin": "https://good.example.evil.example"}
    assert (await client.get("/models", headers=refused)).status == 403
