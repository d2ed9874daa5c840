"""Messages: a conversation in, the next message of it out; and how many tokens that is."""

from __future__ import annotations

from aiohttp import web

from daemon.api.anthropic.shown import MessageAnswer, MessageEvent, MessageView, TokenCount
from daemon.api.anthropic.types import CountBody, MessagesBody
from daemon.api.context import asked_model, services
from daemon.api.errors import read_json
from daemon.api.generation import answer
from daemon.api.operation import WORK, operation
from daemon.api.streams import NamedEventStream


def routes() -> list[web.RouteDef]:
    """Return this module's routes."""
    return [
        web.post("/v1/messages", create_message),
        web.post("/v1/messages/count_tokens", count_tokens),
    ]


@operation(MessageAnswer, body=MessagesBody, stream=MessageEvent, errors=WORK)
async def create_message(request: web.Request) -> web.StreamResponse:
    """MessageAnswer a conversation, at once or as a stream."""
    body = await read_json(request, MessagesBody)
    record = asked_model(request, body.model)
    return await answer(
        request,
        record,
        [body.to_backend()],
        body.terms(),
        view=MessageView(record.unique, body),
        stream=NamedEventStream(request) if body.stream else None,
    )


@operation(TokenCount, body=CountBody, errors=WORK)
async def count_tokens(request: web.Request) -> web.Response:
    """Count the tokens of a prompt, as the model itself will read it."""
    body = await read_json(request, CountBody)
    record = asked_model(request, body.model)
    count = await services(request).models.count(record, body.to_backend(), body.terms())
    counted: TokenCount = {"input_tokens": count.tokens}
    return web.json_response(counted)
