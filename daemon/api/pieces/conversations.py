"""Conversations: listed, shown, begun, renamed, deleted."""

from __future__ import annotations

import asyncio
from typing import Literal, NotRequired, TypedDict

import msgspec
from aiohttp import web

from daemon.api.context import services
from daemon.api.errors import read_json
from daemon.api.operation import JSON, operation
from daemon.api.pieces import messages
from daemon.api.pieces.answers import Created, Reference
from daemon.api.pieces.identifiers import Identifiers, push_identifiers
from daemon.api.pieces.messages import NO_CONVERSATION
from daemon.chats import Chat, Chats
from daemon.errors import InvalidRequest

UNNAMED = "New Conversation"
_NAME_LENGTH = 60


class References(TypedDict):
    """What there is of a kind, in its order, and the place of each."""

    iterable: list[Reference]
    indices: dict[str, int]


class Conversation(TypedDict):
    """A conversation."""

    id: str
    name: str
    type: Literal["COPILOT"]
    created: Created
    updated: Created
    messages: References
    model: NotRequired[Reference]


class Conversations(TypedDict):
    """All conversations, the last one changed first."""

    iterable: list[Conversation]
    indices: dict[str, int]


class SeededConversation(msgspec.Struct):
    """Body of POST /conversations/create; what else clients send is not kept here."""

    name: str | None = None


class ChangedConversation(msgspec.Struct):
    """Body of POST /conversation/update: clients send back all of it, and the name may be new."""

    id: str
    name: str | None = None


def routes() -> list[web.RouteDef]:
    """Return the routes of conversations and of what was said in them."""
    return [
        web.get("/conversations", snapshot_all),
        web.get("/conversations/identifiers", all_identifiers),
        web.get("/conversations/stream/identifiers", identifiers),
        web.post("/conversations/create", create),
        web.post("/conversations/{conversation}/delete", delete),
        web.post("/conversation/update", update),
        web.post("/conversation/{conversation}/rename", rename),
        web.get("/conversation/{conversation}", snapshot),
        *messages.routes(),
    ]


def name_for(words: str) -> str:
    """Return the name of a conversation that begins with these words. Pure."""
    name = " ".join(words.split())
    return (name if len(name) <= _NAME_LENGTH else f"{name[: _NAME_LENGTH - 1]}…") or UNNAMED


def _references(keys: list[str]) -> References:
    return {
        "iterable": [{"id": key} for key in keys],
        "indices": {key: index for index, key in enumerate(keys)},
    }


def _view(chat: Chat, said: list[str]) -> Conversation:
    view: Conversation = {
        "id": chat.id,
        "name": chat.name,
        "type": "COPILOT",
        "created": {"value": chat.created},
        "updated": {"value": chat.updated},
        "messages": _references(said),
    }
    if chat.model:
        view["model"] = {"id": chat.model}
    return view


@operation(Conversations)
async def snapshot_all(request: web.Request) -> web.Response:
    """List all conversations."""
    body = await asyncio.to_thread(_listing, services(request).chats)
    return web.Response(body=body, content_type=JSON)


def _listing(chats: Chats) -> bytes:
    """Return all conversations as JSON: years of them are too much for the event loop."""
    found = [_view(chat, said) for chat, said in chats.contents()]
    answer: Conversations = {
        "iterable": found,
        "indices": {chat["id"]: index for index, chat in enumerate(found)},
    }
    return msgspec.json.encode(answer)


@operation(References)
async def all_identifiers(request: web.Request) -> web.Response:
    """List the ids of all conversations."""
    return web.json_response(_references([chat.id for chat in services(request).chats.all()]))


@operation(Identifiers, frames=Identifiers)
async def identifiers(request: web.Request) -> web.StreamResponse:
    """Push every conversation's id, then the ids of those that change or are deleted."""
    chats = services(request).chats
    every = [chat.id for chat in chats.all()]
    return await push_identifiers(request, "conversation", every, chats.listen)


@operation(Conversation, body=SeededConversation)
async def create(request: web.Request) -> web.Response:
    """Begin a conversation."""
    body = await read_json(request, SeededConversation, strict=False)
    chat = services(request).chats.create(body.name or UNNAMED)
    return web.json_response(_view(chat, []))


@operation(answers={204: None})
async def delete(request: web.Request) -> web.Response:
    """Remove a conversation."""
    chat = _found(request, request.match_info["conversation"])
    services(request).chats.delete(chat.id)
    return web.Response(status=204)


@operation(Conversation, body=ChangedConversation)
async def update(request: web.Request) -> web.Response:
    """Rename a conversation."""
    body = await read_json(request, ChangedConversation, strict=False)
    return _renamed(request, _found(request, body.id), body.name)


@operation(Conversation)
async def rename(request: web.Request) -> web.Response:
    """Name a conversation by how it begins: it would take a model some seconds to find a better."""
    chat = _found(request, request.match_info["conversation"])
    said = services(request).chats.messages(chat.id)
    return _renamed(request, chat, name_for(said[0].text) if said else None)


def _renamed(request: web.Request, chat: Chat, name: str | None) -> web.Response:
    chats = services(request).chats
    if name:
        chats.rename(chat.id, name)
    return web.json_response(_view(_found(request, chat.id), chats.message_ids(chat.id)))


def _found(request: web.Request, key: str) -> Chat:
    chat = services(request).chats.get(key)
    if chat is None:
        raise InvalidRequest(NO_CONVERSATION)
    return chat


@operation(answers={200: Conversation, 410: str})
async def snapshot(request: web.Request) -> web.Response:
    """Show one conversation; 410 if there is none."""
    chats = services(request).chats
    chat = chats.get(request.match_info["conversation"])
    if chat is None:
        return web.Response(status=410, text=NO_CONVERSATION)
    return web.json_response(_view(chat, chats.message_ids(chat.id)))
