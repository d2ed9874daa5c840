"""The OpenAI requests that are understood, with bounds; any other field is refused by name.

What is checked here is all that stands between the network and an engine's parameters.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from backends.contract import (
    ChatRequest,
    CompleteRequest,
    EmbedRequest,
    RerankRequest,
    Sampling,
)
from backends.grammars import MAX_NESTING, nesting
from daemon.api.openai.messages import Body, Message
from daemon.api.openai.tools import Choice, Name, Tool, offer
from daemon.api.terms import Effort, TermsBody
from daemon.errors import InvalidRequest

_Tokens = Annotated[int, msgspec.Meta(ge=-1, le=1_000_000)]  # -1 as llama.cpp has it: no limit
_Penalty = Annotated[float, msgspec.Meta(ge=-2, le=2)]
_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
_Stop = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
_Texts = Annotated[list[str], msgspec.Meta(min_length=1, max_length=2048)]
MOST_CHOICES = 64  # of one request
SEEDS = 2**32 - 1  # the one value beyond means "random" to llama.cpp


class StreamOptions(Body):
    """What a stream carries besides the answer."""

    include_usage: bool = False
    include_obfuscation: bool = False


class TextFormat(Body, tag_field="type", tag="text"):
    """Any text."""


class JsonObjectFormat(Body, tag_field="type", tag="json_object"):
    """Any JSON object."""


class JsonSchema(Body):
    """A JSON schema with a name."""

    name: Name = "answer"
    description: str | None = None
    schema: dict[str, Any] = msgspec.field(default_factory=dict)
    strict: bool | None = None


class JsonSchemaFormat(Body, tag_field="type", tag="json_schema"):
    """JSON that fits a schema; it is always kept to, `strict` or not."""

    json_schema: JsonSchema


class SamplingBody(TermsBody, kw_only=True):
    """What chat and completions share. The last group is accepted and has no effect here."""

    model: str
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: _Tokens | None = None
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
    logit_bias: (
        Annotated[
            dict[str, Annotated[float, msgspec.Meta(ge=-100, le=100)]],
            msgspec.Meta(max_length=1024),
        ]
        | None
    ) = None
    grammar: Annotated[str, msgspec.Meta(max_length=65_536)] = ""
    n: Annotated[int, msgspec.Meta(ge=1, le=16)] | None = None

    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with what it cost."""
        return self.stream_options is not None and self.stream_options.include_usage

    def _sampling(
        self, *, max_tokens: int | None, logprobs: int | None, schema: dict[str, Any] | None = None
    ) -> Sampling:
        """Return the fields that engines get. Raises InvalidRequest."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest(
                "stream_options: only allowed together with stream", param="stream_options"
            )
        if nesting(self.grammar) > MAX_NESTING:
            raise InvalidRequest(
                f"grammar: brackets are nested deeper than {MAX_NESTING}", param="grammar"
            )
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=None if self.seed is None or self.seed < 0 else self.seed % SEEDS,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repeat_penalty=self.repeat_penalty,
            stop=tuple(stop),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            logit_bias=self._logit_bias(),
            json_schema=schema,
            grammar=self.grammar,
        )

    @staticmethod
    def _limit(**given: int | None) -> int | None:
        """Return the first limit that is given. Raises InvalidRequest that names it, if it is 0."""
        for name, limit in given.items():
            if limit == 0:
                raise InvalidRequest(f"{name}: must be at least 1, or -1 for no limit", param=name)
            if limit is not None:
                return None if limit == -1 else limit
        return None

    def _logit_bias(self) -> dict[int, float]:
        biases = {}
        for token, bias in (self.logit_bias or {}).items():
            if not (token.isascii() and token.isdigit()) or len(token) > 9:
                raise InvalidRequest(
                    f"logit_bias: {token!r} is not the id of a token", param="logit_bias"
                )
            biases[int(token)] = bias
        return biases


class ChatBody(SamplingBody, kw_only=True):
    """Body of POST /v1/chat/completions.

    The second group is accepted and has no effect here; the third is not supported, and may be null
    for clients that send all fields that there are.
    """

    messages: Annotated[list[Message], msgspec.Meta(min_length=1, max_length=10_000)]
    max_completion_tokens: _Tokens | None = None
    tools: Annotated[list[Tool], msgspec.Meta(max_length=128)] | None = None
    tool_choice: Choice | None = None
    parallel_tool_calls: bool | None = None
    response_format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    reasoning_effort: Effort | None = None

    modalities: list[Literal["text"]] | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    verbosity: str | None = None

    audio: None = None
    function_call: None = None
    functions: None = None
    moderation: None = None
    prediction: None = None
    web_search_options: None = None

    def to_backend(self) -> ChatRequest:
        """Return the request as backends take it. Raises InvalidRequest."""
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest(
                "top_logprobs: only allowed together with logprobs", param="top_logprobs"
            )
        self._check_images()
        offered = offer(self.tools or (), self.tool_choice)
        return ChatRequest(
            messages=tuple(message.to_backend() for message in self.messages),
            tools=offered.tools,
            tool_choice=offered.tool_choice,
            tool_name=offered.tool_name,
            parallel_tool_calls=self.parallel_tool_calls is not False,
            reasoning_effort=self.reasoning_effort and self.reasoning_effort.to_backend,
            sampling=self._sampling(
                max_tokens=self._limit(
                    max_completion_tokens=self.max_completion_tokens, max_tokens=self.max_tokens
                ),
                logprobs=(self.top_logprobs or 0) if self.logprobs else None,
                schema=self._schema(),
            ),
        )

    @property
    def images(self) -> list[str]:
        """The URLs of all images in the conversation."""
        return [url for message in self.messages for url in message.images]

    def _check_images(self) -> None:
        # An engine would fetch any other URL itself, for whoever asks it to.
        if any(not url.startswith("data:image/") for url in self.images):
            raise InvalidRequest(
                "messages: an image must be a data URL (data:image/png;base64,…)", param="messages"
            )

    def _schema(self) -> dict[str, Any] | None:
        if isinstance(self.response_format, JsonSchemaFormat):
            return self.response_format.json_schema.schema
        return {} if isinstance(self.response_format, JsonObjectFormat) else None


class CompletionBody(SamplingBody, kw_only=True):
    """Body of POST /v1/completions. Each prompt has as many choices as `n` says."""

    prompt: str | Annotated[list[str], msgspec.Meta(min_length=1, max_length=MOST_CHOICES)]
    suffix: str | None = None
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None

    def to_backend(self) -> list[CompleteRequest]:
        """Return the request for each prompt as backends take it. Raises InvalidRequest."""
        prompts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        if len(prompts) * (self.n or 1) > MOST_CHOICES:
            raise InvalidRequest(f"n: more than {MOST_CHOICES} choices for all prompts", param="n")
        limit = self._limit(max_tokens=self.max_tokens)
        sampling = self._sampling(max_tokens=limit, logprobs=self.logprobs)
        return [
            CompleteRequest(prompt=prompt, suffix=self.suffix, sampling=sampling)
            for prompt in prompts
        ]


class EmbeddingsBody(TermsBody, kw_only=True):
    """Body of POST /v1/embeddings. `truncate` cuts texts that are too long for the model."""

    model: str
    input: str | _Texts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, msgspec.Meta(ge=1, le=65_536)] | None = None
    truncate: bool = False
    user: str | None = None

    def to_backend(self) -> EmbedRequest:
        """Return the request as backends take it."""
        inputs = (self.input,) if isinstance(self.input, str) else tuple(self.input)
        return EmbedRequest(inputs=inputs, dimensions=self.dimensions, truncate=self.truncate)


class Document(Body):
    """A text to score."""

    text: str


class RerankBody(TermsBody, kw_only=True):
    """Body of POST /v1/rerank, in the form that Jina, Cohere, vLLM and llama.cpp share."""

    model: str
    query: Annotated[str, msgspec.Meta(min_length=1)]
    documents: Annotated[list[str | Document], msgspec.Meta(min_length=1, max_length=2048)]
    top_n: Annotated[int, msgspec.Meta(ge=1)] | None = None
    return_documents: bool = False
    truncate: bool = False

    @property
    def texts(self) -> tuple[str, ...]:
        """The documents' texts."""
        return tuple(d.text if isinstance(d, Document) else d for d in self.documents)

    def to_backend(self) -> RerankRequest:
        """Return the request as backends take it."""
        return RerankRequest(query=self.query, documents=self.texts, truncate=self.truncate)
