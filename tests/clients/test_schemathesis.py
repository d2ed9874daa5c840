"""Schemathesis holds the daemon to its own description, `/openapi.json`.

It makes requests of the described types, right ones and wrong ones; half of them name models that
are there. Answers must have a status, a content type and a form that the description knows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import requests
import schemathesis
from engines import add_encoders
from gguf_models import tiny_llama
from hub import LocalHub
from hypothesis import strategies
from running import SAMPLE, RunningDaemon
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from daemon.api import app, openapi
from daemon.api.errors import is_pieces
from daemon.api.operation import described

ROUTES = app.routes()
DESCRIBED = openapi.document(ROUTES)["paths"]
ENDLESS = {"/modeld/v1/events"}  # its stream goes on until the client leaves
OPERATIONS = [
    (path, method)
    for path, methods in DESCRIBED.items()
    for method in methods
    if path not in ENDLESS
]
# What a request may say to end its answer soon, by the name that each API has for it.
LIMITS = {
    "/v1/chat/completions": "max_tokens",
    "/v1/completions": "max_tokens",
    "/v1/messages": "max_tokens",
    "/v1/responses": "max_output_tokens",
}
WITH_OPTIONS = ("/api/chat", "/api/generate")
REMOVED = "to-be-removed"
REPO = "owner/tiny"
NAMES = (SAMPLE, SAMPLE, REMOVED)
# What only models of another kind than the sample's do.
KINDS = {
    "/v1/embeddings": "embedder",
    "/api/embed": "embedder",
    "/api/embeddings": "embedder",
    "/v1/rerank": "reranker",
    "/modeld/v1/models/{model}/classify": "classifier",
}
TIMEOUT_S = 60.0
CHECKS = [
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    home = tmp_path_factory.mktemp("described")
    # A request may download it and ask it: it has to be one that loads.
    tiny = tiny_llama(home).read_bytes()
    config = home / "modeld.toml"
    # Questions of the Pieces API have no limit of their own.
    config.write_text("[models]\ncontext_length = 128\nmax_run_s = 10\n")
    with LocalHub() as hub:
        hub.add(REPO, {"tiny.gguf": tiny})
        daemon = RunningDaemon(home, "--config", str(config), HF_ENDPOINT=hub.url)
        try:
            daemon.start().download()
            add_encoders(daemon, home)
            add_one_to_remove(daemon)
            yield daemon
        finally:
            daemon.stop()


@pytest.fixture(scope="module")
def schema(daemon: RunningDaemon) -> Any:
    document = schemathesis.openapi.from_url(f"{daemon.url}/openapi.json")
    # What is wrong with a request may be that it is too long.
    rejection = document.config.checks.negative_data_rejection
    rejection.expected_statuses = [*rejection.expected_statuses, "413"]
    return document


def test_every_route_is_described() -> None:
    assert [(r.method, r.path) for r in ROUTES if described(r.handler) is None] == []


def test_the_document_is_what_the_specification_wants(daemon: RunningDaemon) -> None:
    document = daemon.json("GET", "/openapi.json")
    names = [each["operationId"] for path in document["paths"].values() for each in path.values()]
    assert document["openapi"].startswith("3.1") and len(names) == len(set(names)) == len(ROUTES)
    text = json.dumps(document)
    for name in document["components"]["schemas"]:
        assert f'"#/components/schemas/{name}"' in text, f"{name} is described for nothing"


def pointed(case: Any, path: str, model: str, *, there: bool) -> None:
    """Have a request name a model that is there, and end its answer soon."""
    if there and "model" in (case.path_parameters or {}):
        case.path_parameters["model"] = model
    if not isinstance(case.body, dict):
        return
    for key in ("model", "name"):
        if there and isinstance(case.body.get(key), str):
            case.body[key] = model
    if case.meta.generation.mode is GenerationMode.NEGATIVE:
        return  # what is wrong with it stays: it is to be refused
    for limit in {*LIMITS.values(), "max_completion_tokens"}:
        if isinstance(case.body.get(limit), int) and case.body[limit] > 8:
            case.body[limit] = 8
    # Without a limit it goes on to the end of its context.
    if path in LIMITS and case.body.get(LIMITS[path]) is None:
        case.body[LIMITS[path]] = 8
    if path in WITH_OPTIONS and case.body.get("options") is None:
        case.body["options"] = {}
    case.body.pop("ignore_eos", None)
    case.body.pop("context_length", None)
    if isinstance(options := case.body.get("options"), dict):
        options.pop("num_ctx", None)
        if isinstance(options.setdefault("num_predict", 8), int):
            options["num_predict"] = min(8, options["num_predict"])


def removes(path: str, method: str) -> bool:
    return method == "delete" or "/delete" in path


def check_status(path: str, response: Any) -> None:
    """Only the Pieces API answers all that goes wrong with a 500, and what can't be done is a 501."""
    if response.status_code >= 500 and response.status_code != 501:
        assert is_pieces(path) and response.status_code == 500, response.text
        assert "modeld failed" not in response.text


@pytest.mark.parametrize(("path", "method"), OPERATIONS, ids=lambda value: value)
def test_answers_are_as_described(
    daemon: RunningDaemon, schema: Any, path: str, method: str
) -> None:
    operation = schema[path][method]

    @hypothesis.settings(
        max_examples=25,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(
        case=operation.as_strategy() | operation.as_strategy(GenerationMode.NEGATIVE),
        model=strategies.sampled_from(NAMES),
        there=strategies.booleans(),
    )
    def run(case: Any, model: str, there: bool) -> None:  # noqa: FBT001
        if removes(path, method):
            add_one_to_remove(daemon)
            model = REMOVED
        pointed(case, path, KINDS.get(path, model), there=there)
        response = case.call(timeout=TIMEOUT_S)
        case.validate_response(response, checks=CHECKS)
        check_status(path, response)

    run()
    assert daemon.alive and "Traceback" not in daemon.log


SAY = [{"role": "user", "content": "Hello"}]
STREAMS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": SAY, "max_tokens": 4},
    "/v1/completions": {"prompt": "Hello", "max_tokens": 4},
    "/v1/responses": {"input": "Hello", "max_output_tokens": 4},
    "/v1/messages": {"messages": SAY, "max_tokens": 4},
}


@pytest.mark.parametrize("path", STREAMS)
def test_events_of_streams_are_as_described(schema: Any, path: str) -> None:
    """Random requests that stream seldom are right ones."""
    body = {"model": SAMPLE, "stream": True, **STREAMS[path]}
    case = schema[path]["POST"].Case(body=body, media_type="application/json")
    response = case.call(timeout=TIMEOUT_S)
    case.validate_response(response, checks=CHECKS)
    assert response.status_code == 200 and "data: {" in response.text


def add_one_to_remove(daemon: RunningDaemon) -> None:
    source = {"source": f"hf:{REPO}/tiny.gguf", "unique": REMOVED}
    answer = requests.post(f"{daemon.url}/modeld/v1/models", json=source, timeout=TIMEOUT_S)
    assert answer.status_code in (200, 201)
