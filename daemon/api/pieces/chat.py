"""Questions to models: one by one, and as turns of conversations over a WebSocket.

The API has no word for how to sample, so answers are the likeliest ones: the same question gets the
same answer.
"""

from __future__ import annotations

from aiohttp import web

from daemon.api.context import services
from daemon.api.errors import read_json
from daemon.api.generation import gathered
from daemon.api.operation import operation
from daemon.api.pieces import aliases
from daemon.api.pieces.questions import Answered, Frame, Question, Turn, answered, before, prompt
from daemon.api.pieces.turns import Turns, asked
from daemon.api.sockets import accept, is_upgrade, serve
from daemon.errors import InvalidRequest
from daemon.models import Terms


def routes() -> list[web.RouteDef]:
    """Return this module's routes."""
    return [web.post("/qgpt/question", question), web.get("/qgpt/stream", stream)]


@operation(Answered, body=Question)
async def question(request: web.Request) -> web.Response:
    """Answer a question that is no part of a conversation; it may name messages of some."""
    body = await read_json(request, Question, strict=False)
    record = aliases.chosen(request, body.model)
    messages = [*before(body, services(request).chats), {"role": "user", "content": prompt(body)}]
    ((said, _),) = await gathered(request, record, [asked(messages)], Terms())
    return web.json_response(answered(said.content))


@operation(answers={}, frames=Frame, sent=Turn)
async def stream(request: web.Request) -> web.StreamResponse:
    """Answer the questions that come over a WebSocket; one may carry many, also at once."""
    if not is_upgrade(request):
        raise InvalidRequest("questions are asked over a WebSocket here, or at POST /qgpt/question")
    socket = await accept(request)
    turns = Turns(request, socket)
    try:
        return await serve(request, socket, turns.read())
    finally:
        await turns.close()
