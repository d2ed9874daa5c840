"""Requests as an OpenAI-compatible upstream takes them. Pure.

Only what was set is sent: an upstream may refuse what it does not know, and its own defaults hold
for the rest. What goes beyond OpenAI's API (`top_k`, `min_p`, `repeat_penalty`, `ignore_eos`,
`grammar`) has the names that llama.cpp gave it.
"""

from __future__ import annotations

from typing import Any

from backends.contract import ChatRequest, CompleteRequest, EmbedRequest, RerankRequest, Sampling

_STREAMED = {"stream": True, "stream_options": {"include_usage": True}}


def _sampling(sampling: Sampling) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repeat_penalty": sampling.repeat_penalty,
        "stop": list(sampling.stop) or None,
        "ignore_eos": sampling.ignore_eos or None,
        "logit_bias": {str(token): bias for token, bias in sampling.logit_bias.items()} or None,
        "grammar": sampling.grammar or None,
        "response_format": _response_format(sampling.json_schema),
    }
    return {name: value for name, value in fields.items() if value is not None}


def _response_format(schema: dict[str, Any] | None) -> dict[str, Any] | None:
    if schema is None:
        return None
    if not schema:
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def chat(request: ChatRequest, model: str) -> dict[str, Any]:
    """Return the body of POST /v1/chat/completions."""
    body = {"model": model, "messages": list(request.messages), **_STREAMED}
    body |= _sampling(request.sampling)
    if request.sampling.logprobs is not None:
        body["logprobs"] = True
        if request.sampling.logprobs:
            body["top_logprobs"] = request.sampling.logprobs
    if request.tools:
        body["tools"] = list(request.tools)
        body["parallel_tool_calls"] = request.parallel_tool_calls
        if request.tool_choice == "function":
            body["tool_choice"] = {"type": "function", "function": {"name": request.tool_name}}
        elif request.tool_choice != "auto":
            body["tool_choice"] = request.tool_choice
    if request.reasoning_effort is not None:
        body["reasoning_effort"] = request.reasoning_effort
    return body


def complete(request: CompleteRequest, model: str) -> dict[str, Any]:
    """Return the body of POST /v1/completions."""
    body = {"model": model, "prompt": request.prompt, **_STREAMED}
    body |= _sampling(request.sampling)
    if request.suffix is not None:
        body["suffix"] = request.suffix
    if request.sampling.logprobs is not None:
        body["logprobs"] = request.sampling.logprobs
    return body


def embed(request: EmbedRequest, model: str) -> dict[str, Any]:
    """Return the body of POST /v1/embeddings."""
    # A quarter of the bytes of decimal numbers; servers that do not know it answer with those.
    body = {"model": model, "input": list(request.inputs), "encoding_format": "base64"}
    return body if request.dimensions is None else body | {"dimensions": request.dimensions}


def rerank(request: RerankRequest, model: str) -> dict[str, Any]:
    """Return the body of POST /v1/rerank."""
    return {"model": model, "query": request.query, "documents": list(request.documents)}
