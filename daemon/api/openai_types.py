"""The OpenAI requests that are understood, with bounds; any other field is refused by name.

What is checked here is all that stands between the network and an engine's parameters.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from backends.contract import ChatRequest, Sampling
from daemon.errors import InvalidRequest

_Tokens = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
_Penalty = Annotated[float, msgspec.Meta(ge=-2, le=2)]
_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
_Stop = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
_SEEDS = 2**32 - 1  # the one value beyond means "random" to llama.cpp


class TextPart(msgspec.Struct, forbid_unknown_fields=True):
    """A part of a message."""

    text: str
    type: Literal["text"]


class Message(msgspec.Struct, forbid_unknown_fields=True):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def to_backend(self) -> dict[str, Any]:
        """Return the message with its parts joined, as chat templates want it."""
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """What a stream carries besides the answer."""

    include_usage: bool = False
    include_obfuscation: bool = False


class ResponseFormat(msgspec.Struct, forbid_unknown_fields=True):
    """The form of an answer."""

    type: Literal["text"]


class ChatBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /v1/chat/completions. The last group is accepted and has no effect here."""

    model: str
    messages: Annotated[list[Message], msgspec.Meta(min_length=1, max_length=10_000)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: _Tokens | None = None
    max_completion_tokens: _Tokens | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: _Share | None = None
    top_k: Annotated[int, msgspec.Meta(ge=0, le=100_000)] | None = None
    min_p: _Share | None = None
    seed: int | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    repeat_penalty: Annotated[float, msgspec.Meta(gt=0, le=2)] | None = None
    stop: _Stop | Annotated[list[_Stop], msgspec.Meta(max_length=16)] | None = None
    ignore_eos: bool = False
    n: Literal[1] | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def to_backend(self) -> ChatRequest:
        """Return the request as backends take it. Raises InvalidRequest."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest(
                "stream_options: only allowed together with stream", param="stream_options"
            )
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return ChatRequest(
            messages=tuple(message.to_backend() for message in self.messages),
            sampling=Sampling(
                max_tokens=self.max_completion_tokens or self.max_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                min_p=self.min_p,
                seed=None if self.seed is None else self.seed % _SEEDS,
                presence_penalty=self.presence_penalty,
                frequency_penalty=self.frequency_penalty,
                repeat_penalty=self.repeat_penalty,
                stop=tuple(stop),
                ignore_eos=self.ignore_eos,
            ),
        )
