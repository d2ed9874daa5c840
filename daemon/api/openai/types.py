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
from daemon.errors import InvalidRequest

_Tokens = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
_Penalty = Annotated[float, msgspec.Meta(ge=-2, le=2)]
_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
_Stop = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
_Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.:-]{1,128}$")]
_Texts = Annotated[list[str], msgspec.Meta(min_length=1, max_length=2048)]
_SEEDS = 2**32 - 1  # the one value beyond means "random" to llama.cpp


class _Body(msgspec.Struct, forbid_unknown_fields=True):
    """Base of all that is read here."""


class TextPart(_Body, tag_field="type", tag="text"):
    """Text in a message."""

    text: str


class ImageUrl(_Body):
    """Where an image is: in the URL itself (`data:`)."""

    url: str
    detail: str | None = None


class ImagePart(_Body, tag_field="type", tag="image_url"):
    """An image in a message."""

    image_url: ImageUrl


class CalledFunction(_Body):
    """What an assistant called; `arguments` is JSON."""

    name: str
    arguments: str


class CalledTool(_Body):
    """A call in an assistant's message."""

    id: str
    function: CalledFunction
    type: Literal["function"] = "function"
    index: int | None = None


class Message(_Body, kw_only=True):
    """One message of a conversation. The last group is what answers carry and nobody needs back."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart | ImagePart] | None = None
    name: str | None = None
    tool_calls: Annotated[list[CalledTool], msgspec.Meta(max_length=128)] | None = None
    tool_call_id: str | None = None

    reasoning_content: str | None = None
    refusal: None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None

    def to_backend(self) -> dict[str, Any]:
        """Return the message as chat templates want it; text alone is one string."""
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": self._content()}
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": msgspec.structs.asdict(call.function),
                }
                for call in self.tool_calls
            ]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.name is not None and self.role == "tool":
            message["name"] = self.name
        return message

    @property
    def images(self) -> list[str]:
        """The URLs of the images in the message."""
        if not isinstance(self.content, list):
            return []
        return [part.image_url.url for part in self.content if isinstance(part, ImagePart)]

    def _content(self) -> Any:
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        if not self.images:
            return "".join(part.text for part in self.content if isinstance(part, TextPart))
        return [
            {"type": "text", "text": part.text}
            if isinstance(part, TextPart)
            else {"type": "image_url", "image_url": {"url": part.image_url.url}}
            for part in self.content
        ]


class Function(_Body):
    """A function that a model may call; `parameters` is a JSON schema."""

    name: _Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Body):
    """A tool that a model may use."""

    function: Function
    type: Literal["function"] = "function"

    def to_backend(self) -> dict[str, Any]:
        """Return the tool without what was not given."""
        fields = msgspec.structs.asdict(self.function)
        kept = {name: value for name, value in fields.items() if value is not None}
        return {"type": "function", "function": kept}


class ChosenFunction(_Body):
    """The function to call."""

    name: _Name


class ToolChoice(_Body):
    """A call of this function is required."""

    function: ChosenFunction
    type: Literal["function"] = "function"


class StreamOptions(_Body):
    """What a stream carries besides the answer."""

    include_usage: bool = False
    include_obfuscation: bool = False


class TextFormat(_Body, tag_field="type", tag="text"):
    """Any text."""


class JsonObjectFormat(_Body, tag_field="type", tag="json_object"):
    """Any JSON object."""


class JsonSchema(_Body):
    """A JSON schema with a name."""

    name: _Name = "answer"
    description: str | None = None
    schema: dict[str, Any] = {}
    strict: bool | None = None


class JsonSchemaFormat(_Body, tag_field="type", tag="json_schema"):
    """JSON that fits a schema; it is always kept to, `strict` or not."""

    json_schema: JsonSchema


class SamplingBody(_Body, kw_only=True):
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
    n: Literal[1] | None = None

    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

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
            seed=None if self.seed is None else self.seed % _SEEDS,
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
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], msgspec.Meta(min_length=1, max_length=10_000)]
    max_completion_tokens: _Tokens | None = None
    tools: Annotated[list[Tool], msgspec.Meta(max_length=128)] | None = None
    tool_choice: Literal["auto", "none", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None

    def to_backend(self) -> ChatRequest:
        """Return the request as backends take it. Raises InvalidRequest."""
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest(
                "top_logprobs: only allowed together with logprobs", param="top_logprobs"
            )
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise InvalidRequest("tool_choice: there are no tools to call", param="tool_choice")
        self._check_images()
        tools = tuple(tool.to_backend() for tool in self.tools or ())
        if self.tool_choice == "none":
            tools = ()
        named = isinstance(self.tool_choice, ToolChoice)
        return ChatRequest(
            messages=tuple(message.to_backend() for message in self.messages),
            tools=tools,
            tool_choice="function" if named else str(self.tool_choice or "auto"),
            tool_name=self.tool_choice.function.name
            if isinstance(self.tool_choice, ToolChoice)
            else "",
            parallel_tool_calls=bool(self.parallel_tool_calls),
            sampling=self._sampling(
                max_tokens=self.max_completion_tokens or self.max_tokens,
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
    """Body of POST /v1/completions."""

    prompt: str | Annotated[list[str], msgspec.Meta(min_length=1, max_length=1)]
    suffix: str | None = None
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None

    def to_backend(self) -> CompleteRequest:
        """Return the request as backends take it. Raises InvalidRequest."""
        return CompleteRequest(
            prompt=self.prompt if isinstance(self.prompt, str) else self.prompt[0],
            suffix=self.suffix,
            sampling=self._sampling(max_tokens=self.max_tokens, logprobs=self.logprobs),
        )


class EmbeddingsBody(_Body):
    """Body of POST /v1/embeddings. `truncate` cuts texts that are too long for the model."""

    model: str
    input: str | _Texts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, msgspec.Meta(ge=1, le=65_536)] | None = None
    truncate: bool = False
    user: str | None = None

    def to_backend(self) -> EmbedRequest:
        """Return the request as backends take it."""
        inputs = (self.input,) if isinstance(self.input, str) else tuple(self.input)
        return EmbedRequest(inputs=inputs, dimensions=self.dimensions, truncate=self.truncate)


class Document(_Body):
    """A text to score."""

    text: str


class RerankBody(_Body):
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
