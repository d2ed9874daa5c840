"""What was said in conversations: shown, reworded, removed."""

from __future__ import annotations

from typing import Literal, TypedDict

import msgspec
from aiohttp import web

from daemon.api.context import services
from daemon.api.errors import read_json
from daemon.api.operation import operation
from daemon.api.pieces.answers import Created, Reference
from daemon.chats import ChatMessage
from daemon.errors import InvalidRequest

NO_CONVERSATION = "conversation was not found."
_GONE = "message was not found."


class Raw(TypedDict):
    """Text."""

    raw: str


class Fragment(TypedDict):
    """What a message says."""

    string: Raw


class Message(TypedDict):
    """What somebody said in a conversation."""

    id: str
    conversation: Reference
    created: Created
    updated: Created
    role: Literal["USER", "ASSISTANT"]
    fragment: Fragment


class Messages(TypedDict):
    """All that was said in a conversation."""

    iterable: list[Message]


class RawBody(msgspec.Struct):
    """The text of a message that was changed."""

    raw: str


class FragmentBody(msgspec.Struct):
    """What a message that was changed says."""

    string: RawBody


class MessageBody(msgspec.Struct):
    """Body of POST /message/update/value: clients send back all of it; the text may be new."""

    id: str
    fragment: FragmentBody


def routes() -> list[web.RouteDef]:
    """Return this module's routes."""
    return [
        web.get("/conversation/{conversation}/messages", snapshot_all),
        web.get("/message/{message}", snapshot),
        web.post("/message/update/value", update),
        web.post("/messages/{message}/delete", delete),
    ]


def _view(said: ChatMessage) -> Message:
    return {
        "id": said.id,
        "conversation": {"id": said.chat},
        "created": {"value": said.created},
        "updated": {"value": said.created},
        "role": "USER" if said.role == "user" else "ASSISTANT",
        "fragment": {"string": {"raw": said.text}},
    }


@operation(answers={200: Messages, 410: str})
async def snapshot_all(request: web.Request) -> web.Response:
    """Show all that was said in a conversation; 410 if there is none."""
    chats = services(request).chats
    key = request.match_info["conversation"]
    if chats.get(key) is None:
        return web.Response(status=410, text=NO_CONVERSATION)
    answer: Messages = {"iterable": [_view(said) for said in chats.messages(key)]}
    return web.json_response(answer)


@operation(answers={200: Message, 410: str})
async def snapshot(request: web.Request) -> web.Response:
    """Show one message; 410 if there is none."""
    said = services(request).chats.message(request.match_info["message"])
    if said is None:
        return web.Response(status=410, text=_GONE)
    return web.json_response(_view(said))


@operation(Message, body=MessageBody)
async def update(request: web.Request) -> web.Response:
    """Change what a message says; later turns of its conversation know no other words."""
    body = await read_json(request, MessageBody, strict=False)
    said = _found(request, body.id)
    return web.json_response(_view(services(request).chats.reword(said, body.fragment.string.raw)))


@operation(answers={204: None})
async def delete(request: web.Request) -> web.Response:
    """Remove a message."""
    services(request).chats.unsay(_found(request, request.match_info["message"]))
    return web.Response(status=204)


def _found(request: web.Request, key: str) -> ChatMessage:
    said = services(request).chats.message(key)
    if said is None:
        raise InvalidRequest(_GONE)
    return said
