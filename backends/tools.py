"""Calls of tools that a request insists on, for any engine that can hold an answer to a schema.

Engines differ in what `tool_choice` means to them, and chat templates in whether they know tools at
all. So a call that is required is asked for in plain words and enforced by a JSON schema. Pure.
"""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import replace
from typing import Any

from backends.contract import BackendError, ChatRequest, Done, Generation, ToolCall

_REFERENCE = re.compile(r"^#/(\$defs|definitions)/")


def must_call(request: ChatRequest) -> tuple[dict[str, Any], ...]:
    """Return the tools of which one has to be called; none if the request leaves it open.

    Raises BackendError for a choice that names no tool of the request.
    """
    if request.tool_choice not in ("required", "function"):
        return ()
    if request.tool_choice == "required":
        chosen = request.tools
    else:
        named = (tool for tool in request.tools if tool["function"]["name"] == request.tool_name)
        chosen = tuple(named)
    if not chosen:
        wanted = request.tool_name or "a tool"
        raise BackendError(
            "invalid_request", f"tool_choice asks for {wanted!r}, which is not among the tools"
        )
    if request.sampling.json_schema is not None or request.sampling.grammar:
        raise BackendError(
            "invalid_request",
            "tool_choice requires a call, which leaves no room for a response_format or a grammar",
        )
    return chosen


def call_schema(tools: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """Return the JSON schema of one call: an object with `name` and `arguments`."""
    definitions: dict[str, Any] = {}
    calls = []
    for number, tool in enumerate(tools):
        parameters = tool["function"].get("parameters") or {"type": "object"}
        calls.append(
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool["function"]["name"]},
                    "arguments": _lifted(parameters, f"{number}_", definitions),
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    schema = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return schema | {"$defs": definitions} if definitions else schema


def _lifted(schema: dict[str, Any], prefix: str, definitions: dict[str, Any]) -> dict[str, Any]:
    """Return a schema that may stand inside another one.

    References go from the root of a document. What they refer to is moved to `definitions`, which
    is for the new root, under names that begin with `prefix`.
    """

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(item) for item in value]
        if not isinstance(value, dict):
            return value
        return {
            key: _REFERENCE.sub(rf"#/$defs/{prefix}", item)
            if key == "$ref" and isinstance(item, str)
            else moved(item)
            for key, item in value.items()
        }

    for key in ("definitions", "$defs"):
        own = schema.get(key)
        if isinstance(own, dict):
            definitions |= {f"{prefix}{name}": moved(item) for name, item in own.items()}
    kept = {key: item for key, item in schema.items() if key not in ("definitions", "$defs")}
    return dict(moved(kept))


def insisting(request: ChatRequest, tools: tuple[dict[str, Any], ...]) -> ChatRequest:
    """Return the request that asks for a call of one of `tools`, and for nothing else."""
    described = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    words = (
        "Answer with a call of one of these functions, as one JSON object with the name of the "
        f"function and its arguments.\n{described}"
    )
    messages = [dict(message) for message in request.messages]
    if messages and messages[0]["role"] == "system" and isinstance(messages[0]["content"], str):
        messages[0]["content"] += f"\n\n{words}"
    else:
        messages.insert(0, {"role": "system", "content": words})
    return replace(
        request,
        messages=tuple(messages),
        tools=(),
        tool_choice="none",
        # A stop sequence within the JSON would leave no call at all.
        sampling=replace(request.sampling, json_schema=call_schema(tools), stop=()),
    )


def parse_call(text: str) -> ToolCall | None:
    """Return the call that an answer under `call_schema` is; None if the answer was cut short."""
    try:
        call = json.loads(text)
    except ValueError:
        return None
    return ToolCall(
        index=0,
        id=f"call_{secrets.token_hex(12)}",
        name=call["name"],
        arguments=json.dumps(call["arguments"], ensure_ascii=False),
    )


def first_call_only(generation: Generation) -> Generation:
    """Return the answer without all calls but the first.

    llama.cpp tells its grammar that there may be but one, and a grammar that waits for the first
    does not see what comes after that.
    """
    while True:
        try:
            piece = next(generation)
        except StopIteration as end:
            done: Done = end.value
            return done
        first = tuple(call for call in piece.tool_calls if call.index == 0)
        if first or piece.content or piece.reasoning or piece.logprobs:
            yield replace(piece, tool_calls=first)


def spelled_out(
    messages: tuple[dict[str, Any], ...], chat_template: str
) -> tuple[dict[str, Any], ...]:
    """Return the messages with earlier calls written as text, if the template knows no calls."""
    if "tool_calls" in chat_template:
        return messages
    plain = []
    for message in messages:
        calls = message.get("tool_calls")
        if not calls:
            plain.append(message)
            continue
        texts = []
        for call in calls:
            function = call["function"]
            named = {"name": function["name"], "arguments": _arguments(function["arguments"])}
            texts.append(json.dumps(named, ensure_ascii=False))
        said = message.get("content") or ""
        if isinstance(said, str):
            content: Any = "\n".join([said, *texts] if said else texts)
        else:
            content = [*said, {"type": "text", "text": "\n".join(texts)}]
        plain.append({"role": message["role"], "content": content})
    return tuple(plain)


def _arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
