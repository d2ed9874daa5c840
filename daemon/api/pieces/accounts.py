"""Who uses the daemon, as the Pieces API has it: a local user, and the apps that connected."""

from __future__ import annotations

import uuid
from typing import TypedDict

import msgspec
from aiohttp import web

from daemon.api.context import services
from daemon.api.errors import read_json
from daemon.api.operation import operation
from daemon.api.pieces.enums import APPLICATIONS, PLATFORMS
from daemon.api.sockets import accept, is_upgrade, push

_APPLICATIONS: web.AppKey[dict[str, Application]] = web.AppKey("applications")


class SeededApplication(msgspec.Struct):
    """An app that connects; what else it says of itself is of no interest."""

    name: str
    version: str = "0.0.0"
    platform: str = "UNKNOWN"


class ConnectBody(msgspec.Struct):
    """Body of POST /connect."""

    application: SeededApplication


class Application(TypedDict):
    """An app that has connected."""

    id: str
    name: str
    version: str
    platform: str
    onboarded: bool
    privacy: str


class Applications(TypedDict):
    """All apps that have connected since the daemon was started."""

    iterable: list[Application]


class OsHealth(TypedDict):
    """The installation that answers."""

    id: str
    version: str


class HealthOfOs(TypedDict):
    """The daemon is well."""

    os: OsHealth


class Connected(TypedDict):
    """What an app learns when it connects."""

    application: Application
    health: HealthOfOs
    os: str


class Theme(TypedDict):
    """How an app should look."""

    dark: bool


class Font(TypedDict):
    """How large its letters should be."""

    size: int


class Aesthetics(TypedDict):
    """What is the same for all users."""

    theme: Theme
    font: Font


class UserProfile(TypedDict):
    """The user of this computer, of whom nothing is known."""

    id: str
    name: str
    email: str
    picture: str
    aesthetics: Aesthetics


class User(TypedDict):
    """Who is logged in: always the local user."""

    user: UserProfile


def routes() -> list[web.RouteDef]:
    """Return this module's routes."""
    return [
        web.post("/connect", connect),
        web.get("/user", user),
        web.get("/user/stream", stream_user),
        web.get("/applications", applications),
    ]


def keep(app: web.Application) -> None:
    """Have `app` know which apps connected."""
    app[_APPLICATIONS] = {}


@operation(Connected, body=ConnectBody)
async def connect(request: web.Request) -> web.Response:
    """Take note of an app, and tell it the id that it is known by."""
    body = await read_json(request, ConnectBody, strict=False)
    parts = services(request)
    asked = body.application
    name = asked.name if asked.name in APPLICATIONS else "UNKNOWN"
    where = asked.platform if asked.platform in PLATFORMS else "UNKNOWN"
    key = str(uuid.uuid5(uuid.UUID(parts.identity), f"{name} {where} {asked.version}"))
    application: Application = {
        "id": key,
        "name": name,
        "version": asked.version,
        "platform": where,
        "onboarded": True,
        "privacy": "CLOSED",  # nothing leaves this computer
    }
    request.config_dict[_APPLICATIONS][key] = application
    answer: Connected = {
        "application": application,
        "health": {"os": {"id": parts.identity, "version": parts.config.server.pieces_version}},
        "os": parts.identity,
    }
    return web.json_response(answer)


@operation(User)
async def user(request: web.Request) -> web.Response:
    """Show the local user."""
    answer: User = {"user": _profile(request)}
    return web.json_response(answer)


@operation(UserProfile, frames=UserProfile)
async def stream_user(request: web.Request) -> web.StreamResponse:
    """Push the local user, once: nothing about it ever changes."""
    if not is_upgrade(request):
        return web.json_response(_profile(request))
    socket = await accept(request)

    async def send() -> None:
        await socket.send_json(_profile(request))
        await services(request).stopping.wait()

    return await push(request, socket, send())


@operation(Applications)
async def applications(request: web.Request) -> web.Response:
    """List the apps that have connected."""
    answer: Applications = {"iterable": list(request.config_dict[_APPLICATIONS].values())}
    return web.json_response(answer)


def _profile(request: web.Request) -> UserProfile:
    identity = uuid.UUID(services(request).identity)
    return {
        "id": str(uuid.uuid5(identity, "user")),
        "name": "local user",
        # Left out, clients put another in the place of each: one fetches a picture from the web.
        "email": "",
        "picture": "",
        "aesthetics": {"theme": {"dark": True}, "font": {"size": 14}},
    }
