"""The engine's JSON: requests in, chunks of answers out. Pure.

Its fields are those of llama.cpp's server (github.com/ggml-org/llama.cpp, tools/server/README.md).
"""

from __future__ import annotations

import re
from typing import Any

from backends import grammars, thinking
from backends.contract import (
    BackendError,
    ChatRequest,
    CompleteRequest,
    Delta,
    Done,
    Sampling,
    Timings,
    TokenLogprob,
    ToolCall,
    Usage,
)
from backends.roles import Refused
from backends.room import context_exceeded

# A request that does not stream can't be cancelled, and progress is what calls back in a prompt.
_ALWAYS = {"stream": True, "stream_options": {"include_usage": True}, "return_progress": True}
_MAX_REPEATS = 10_000  # a million of them took 1.7 GB
_IMPOSSIBLE = -9999.0  # a log-probability, as the OpenAI API has it
# How it ends what it says of a template that failed, after where in its text that was; and the one
# conversation that it refuses by itself.
_REFUSAL = re.compile(
    r"(?:\nError: (?:Jinja Exception: )?|\A(?=Cannot have 2 or more assistant messages))(.+?)\s*\Z",
    re.DOTALL,
)
_SAMPLING_FIELDS = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repeat_penalty",
    "json_schema",
)


def _sampling(sampling: Sampling) -> dict[str, Any]:
    """Return the engine's fields for `sampling`, leaving its defaults alone."""
    fields = {name: getattr(sampling, name) for name in _SAMPLING_FIELDS}
    chosen = {name: value for name, value in fields.items() if value is not None}
    if sampling.json_schema is not None:
        grammars.check_repeats(sampling.json_schema, _MAX_REPEATS)
    if sampling.json_schema == {}:
        chosen["json_schema"] = {"type": "object"}
    if sampling.stop:
        chosen |= {"stop": list(sampling.stop), "verbose": True}  # or it does not tell which it was
    if sampling.ignore_eos:
        chosen["ignore_eos"] = True
    if sampling.grammar:
        chosen["grammar"] = sampling.grammar
    if sampling.logit_bias:
        chosen["logit_bias"] = [[token, bias] for token, bias in sampling.logit_bias.items()]
    return chosen


def chat_body(request: ChatRequest) -> dict[str, Any]:
    """Return the body for `handle_chat_completions`."""
    body = {"messages": list(request.messages), **_ALWAYS, **_sampling(request.sampling)}
    if request.sampling.logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": max(1, request.sampling.logprobs)}
    if request.tools:
        body |= {
            "tools": list(request.tools),
            "tool_choice": request.tool_choice,
            "parallel_tool_calls": request.parallel_tool_calls,
        }
    if told := thinking.variables(request):
        body["chat_template_kwargs"] = told
    return body


def complete_body(
    request: CompleteRequest, infill_tokens: tuple[int, int, int] | None
) -> dict[str, Any]:
    """Return the body for `handle_completions`.

    A suffix comes before the middle that is asked for: prefix, suffix, middle, each announced by
    its own token. Raises BackendError for a suffix that the model has no tokens for.
    """
    prompt: Any = request.prompt
    if request.suffix is not None:
        if infill_tokens is None:
            raise BackendError("invalid_request", "this model can't fill in: leave out `suffix`")
        before, after, middle = infill_tokens
        parts = (before, request.prompt, after, request.suffix, middle)
        prompt = [part for part in parts if part != ""]
    elif not prompt:
        raise BackendError("invalid_request", "the prompt is empty")
    body = {"prompt": prompt, **_ALWAYS, **_sampling(request.sampling)}
    if request.sampling.logprobs is not None:
        body["n_probs"] = max(1, request.sampling.logprobs)
    return body


def _least(logprob: float | None) -> float:
    """Return a log-probability; that of the impossible has no number in JSON."""
    return _IMPOSSIBLE if logprob is None else max(logprob, _IMPOSSIBLE)


def _logprob(entry: dict[str, Any], alternatives: int) -> TokenLogprob:
    return TokenLogprob(
        token=entry["token"],
        logprob=_least(entry["logprob"]),
        bytes=tuple(entry["bytes"]),
        top=tuple(_logprob(top, 0) for top in entry.get("top_logprobs", ())[:alternatives]),
    )


def _tool_call(piece: dict[str, Any]) -> ToolCall:
    function = piece.get("function") or {}
    return ToolCall(
        index=piece["index"],
        id=piece.get("id") or "",
        name=function.get("name") or "",
        arguments=function.get("arguments") or "",
    )


def delta(choice: dict[str, Any], sampling: Sampling) -> Delta | None:
    """Return what a choice of a chunk adds to the answer, or None if that is nothing."""
    said = choice.get("delta") or {"content": choice.get("text")}
    entries = (choice.get("logprobs") or {}).get("content") or ()
    found = Delta(
        content=said.get("content") or "",
        reasoning=said.get("reasoning_content") or "",
        tool_calls=tuple(_tool_call(piece) for piece in said.get("tool_calls") or ()),
        logprobs=tuple(_logprob(entry, sampling.logprobs or 0) for entry in entries),
    )
    return None if found == Delta() else found


def stopping_word(chunk: dict[str, Any]) -> str:
    """Return the stop sequence that ended the answer, from the chunk that has its end; or none."""
    return str((chunk.get("__verbose") or {}).get("stopping_word", ""))


def done(finish_reason: str, final: dict[str, Any], stopped_by: str = "") -> Done:
    """Return the end of a generation, from its last chunk."""
    timings = final.get("timings") or {}
    return Done(
        finish_reason=finish_reason,
        usage=usage(final),
        timings=Timings(
            prompt_ms=timings.get("prompt_ms", 0.0), predicted_ms=timings.get("predicted_ms", 0.0)
        ),
        stopped_by=stopped_by,
    )


def prompt_tokens(chunk: dict[str, Any]) -> int:
    """Return how many tokens the prompt has, from a chunk that tells how far it is read; or 0."""
    return int((chunk.get("prompt_progress") or {}).get("total", 0))


def usage(answer: dict[str, Any]) -> Usage:
    """Return what an answer cost."""
    counted = answer.get("usage") or {}
    details = counted.get("prompt_tokens_details") or {}
    return Usage(
        prompt_tokens=counted.get("prompt_tokens", 0),
        completion_tokens=counted.get("completion_tokens", 0),
        cached_tokens=details.get("cached_tokens", 0),
    )


def error(said: dict[str, Any]) -> BackendError:
    """Translate the engine's error object."""
    if said.get("type") == "exceed_context_size_error":
        return context_exceeded(said.get("n_prompt_tokens", 0), said.get("n_ctx", 0))
    message = str(said.get("message", "the engine gave no reason"))
    if said.get("code") != 400:
        return BackendError("engine_error", message)
    refusal = _REFUSAL.search(message)
    return Refused(refusal[1]) if refusal else BackendError("invalid_request", message)
