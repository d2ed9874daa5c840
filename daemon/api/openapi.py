"""`/openapi.json`: every route, described by the types that its handler checks and answers with.

The version of the OpenAPI Specification is 3.1: https://spec.openapis.org/oas/v3.1.1.html
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any, NotRequired, TypedDict

import msgspec
from aiohttp import web

from daemon import __version__
from daemon.api.errors import ErrorAnswer, is_pieces
from daemon.api.operation import JSON, SSE, TEXT, Operation, described, operation
from daemon.errors import Forbidden, InternalError, ModeldError

_REF = "#/components/schemas/{name}"
_TOO_LARGE = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
_KEPT = web.AppKey("openapi", bytes)


class OllamaError(TypedDict):
    """An error in the form of the Ollama API."""

    error: str


class AnthropicErrorFields(TypedDict):
    """What went wrong."""

    type: str
    message: str


class AnthropicError(TypedDict):
    """An error in the form of the Anthropic API."""

    type: str
    error: AnthropicErrorFields


class Document(TypedDict):
    """An OpenAPI document."""

    openapi: str
    info: dict[str, Any]
    paths: dict[str, Any]
    components: NotRequired[dict[str, Any]]


def routes() -> list[web.RouteDef]:
    """Return this module's route."""
    return [web.get("/openapi.json", show)]


@operation(Document)
async def show(request: web.Request) -> web.Response:
    """Show the description of all routes."""
    return web.Response(body=request.config_dict[_KEPT], content_type=JSON)


def keep(app: web.Application, found: Iterable[web.RouteDef]) -> None:
    """Have `app` show the description of these routes."""
    app[_KEPT] = msgspec.json.encode(document(found))


def document(found: Iterable[web.RouteDef]) -> Document:
    """Return the OpenAPI document of these routes. Pure. What nothing describes is left out."""
    operations: list[tuple[str, str, Any, Operation]] = [
        (route.method, route.path, route.handler, about)
        for route in found
        if (about := described(route.handler)) is not None
    ]
    schemas = _Schemas(type_ for _, path, _, about in operations for type_ in _types(path, about))
    paths: dict[str, Any] = {}
    names: set[str] = set()
    for method, path, handler, about in operations:
        shown = _shown(schemas, path, handler, about)
        if shown["operationId"] in names:  # a handler of several routes
            shown["operationId"] += re.sub(r"\W+", "_", path)
        names.add(shown["operationId"])
        paths.setdefault(path, {})[method.lower()] = shown
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "modeld",
            "version": __version__,
            "description": "Downloads, loads, runs and unloads models for all apps of a computer.",
        },
        "paths": paths,
        "components": {"schemas": schemas.referred_to(paths)},
    }


class _Schemas:
    """The JSON schemas of all types that are used, each under its name."""

    def __init__(self, types: Iterable[Any]) -> None:
        wanted = list(dict.fromkeys(types))
        shown, self.components = msgspec.json.schema_components(wanted, ref_template=_REF)
        self._shown: Mapping[Any, Any] = dict(zip(wanted, shown, strict=True))

    def of(self, type_: Any) -> Any:
        """Return the schema of a type."""
        return self._shown[type_]

    def referred_to(self, paths: Mapping[str, Any]) -> dict[str, Any]:
        """Return those that something refers to: the fields of a query are shown one by one."""
        text = msgspec.json.encode((paths, self.components)).decode()
        return {
            name: schema
            for name, schema in self.components.items()
            if f'"{_REF.format(name=name)}"' in text
        }


def _error_type(path: str) -> Any:
    """Return the form of errors of a JSON surface."""
    if path.startswith("/api/"):
        return OllamaError
    return AnthropicError if path.startswith("/v1/messages") else ErrorAnswer


def _types(path: str, about: Operation) -> Iterable[Any]:
    types = (about.body, about.query, about.frames, about.sent)
    for type_ in (*types, *_pieces(about), *about.answers.values()):
        if type_ is not None and type_ is not str:
            yield type_
    yield _error_type(path)


def _pieces(about: Operation) -> tuple[Any, ...]:
    return about.stream if isinstance(about.stream, tuple) else (about.stream,)


def _shown(schemas: _Schemas, path: str, handler: Any, about: Operation) -> dict[str, Any]:
    text = inspect.getdoc(handler) or ""
    summary, _, more = text.partition("\n\n")
    surface = handler.__module__.removeprefix("daemon.api.").split(".")
    shown: dict[str, Any] = {
        "operationId": "_".join((*surface, handler.__name__)),
        "tags": [surface[0]],
        "summary": summary.replace("\n", " "),
        "responses": _responses(schemas, path, about),
    }
    if more:
        shown["description"] = more
    if parameters := [*_in_path(path), *_in_query(schemas, about)]:
        shown["parameters"] = parameters
    if about.body is not None:
        content = {JSON: {"schema": schemas.of(about.body)}}
        shown["requestBody"] = {"required": not about.optional_body, "content": content}
    return shown


def _in_path(path: str) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)}", path)
    ]


def _in_query(schemas: _Schemas, about: Operation) -> list[dict[str, Any]]:
    if about.query is None:
        return []
    name = schemas.of(about.query)["$ref"].rpartition("/")[2]
    schema = schemas.components[name]
    return [
        {"name": key, "in": "query", "required": key in schema["required"], "schema": each}
        for key, each in schema["properties"].items()
    ]


def _responses(schemas: _Schemas, path: str, about: Operation) -> dict[str, Any]:
    responses: dict[str, Any] = {}
    for status, type_ in about.answers.items():
        content: dict[str, Any] = {}
        if type_ is str:
            content[TEXT] = {"schema": {"type": "string"}}
        elif type_ is not None:
            content[JSON] = {"schema": schemas.of(type_)}
        if about.stream is not None:
            # OpenAPI 3.1 has no word for the parts of a stream; 3.2 calls this itemSchema.
            pieces = [schemas.of(type_) for type_ in _pieces(about)]
            piece = pieces[0] if len(pieces) == 1 else {"anyOf": pieces}
            whole = _event(piece, about.last) if about.stream_type == SSE else {"type": "string"}
            content[about.stream_type] = {"schema": whole, "x-itemSchema": piece}
        responses[str(status)] = _response(status, content)
    if about.frames is not None:
        frame = {"type": "string"} if about.frames is str else schemas.of(about.frames)
        responses["101"] = {"description": "A WebSocket", "x-itemSchema": frame}
        if about.sent is not None:
            responses["101"]["x-sentSchema"] = schemas.of(about.sent)
    error = {"schema": schemas.of(_error_type(path))}
    content = {TEXT: {"schema": {"type": "string"}}} if is_pieces(path) else {JSON: error}
    for status in sorted(_error_statuses(path, about)):
        responses.setdefault(str(status), _response(status, content))
    return responses


def _event(piece: Any, last: str) -> dict[str, Any]:
    """Return the schema of each event of a stream, as tools take the schema of one to be."""
    json_of_piece = {"type": "string", "contentMediaType": JSON, "contentSchema": piece}
    data = {"anyOf": [{"const": last}, json_of_piece]} if last else json_of_piece
    properties = {"event": {"type": "string"}, "data": data}
    return {"type": "object", "properties": properties, "required": ["data"]}


def _response(status: int, content: Mapping[str, Any]) -> dict[str, Any]:
    response: dict[str, Any] = {"description": HTTPStatus(status).phrase}
    return response | ({"content": content} if content else {})


def _error_statuses(path: str, about: Operation) -> set[int]:
    """Return the statuses of what a route may refuse: the Pieces API has 500 alone for its own."""
    anywhere: tuple[type[ModeldError], ...] = (Forbidden, InternalError)
    own = set() if is_pieces(path) else {error.status for error in about.errors}
    large = {int(_TOO_LARGE)} if about.body is not None else set()
    return {error.status for error in anywhere} | own | large
