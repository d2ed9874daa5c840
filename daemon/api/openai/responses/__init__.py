"""The Responses API: a conversation in, the items that come next out. Nothing of it is kept."""

from __future__ import annotations

from aiohttp import web

from daemon.api.context import asked_model, services
from daemon.api.errors import read_json
from daemon.api.generation import answer
from daemon.api.openai.responses.answers import InputTokens, Response, ResponseEvent
from daemon.api.openai.responses.shown import ResponseView
from daemon.api.openai.responses.types import CountBody, ResponseBody
from daemon.api.operation import WORK, operation
from daemon.api.streams import NamedEventStream


def routes() -> list[web.RouteDef]:
    """Return this module's routes."""
    return [
        web.post("/v1/responses", create_response),
        web.post("/v1/responses/input_tokens", count_input),
    ]


@operation(Response, body=ResponseBody, stream=ResponseEvent, errors=WORK)
async def create_response(request: web.Request) -> web.StreamResponse:
    """Answer a conversation, at once or as a stream of events."""
    body = await read_json(request, ResponseBody)
    record = asked_model(request, body.model)
    return await answer(
        request,
        record,
        [body.to_backend()],
        body.terms(),
        view=ResponseView(record.unique, body),
        stream=NamedEventStream(request) if body.stream else None,
    )


@operation(InputTokens, body=CountBody, errors=WORK)
async def count_input(request: web.Request) -> web.Response:
    """Count the tokens of a prompt, as the model itself will read it."""
    body = await read_json(request, CountBody)
    record = asked_model(request, body.model)
    count = await services(request).models.count(record, body.to_backend(), body.terms())
    counted: InputTokens = {"object": "response.input_tokens", "input_tokens": count.tokens}
    return web.json_response(counted)
