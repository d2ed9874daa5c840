"""The Ollama requests that are understood, with bounds; any other field is refused by name.

What is listed as without effect is accepted since clients send it by habit.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from backends.contract import ChatRequest, CompleteRequest, EmbedRequest, Sampling
from daemon.api.ollama import templates
from daemon.api.ollama.messages import Message, image_url, to_backend
from daemon.api.openai.tools import Tool
from daemon.api.openai.types import SEEDS
from daemon.api.terms import Effort, duration
from daemon.catalog.record import ModelRecord
from daemon.errors import InvalidRequest
from daemon.models import Priority, Terms

_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
_Penalty = Annotated[float, msgspec.Meta(ge=-2, le=2)]
_Stop = Annotated[str, msgspec.Meta(max_length=256)]
# Some clients write whole numbers as 8192.0; what is behind the point is cut off, as Ollama does.
_Tokens = Annotated[float, msgspec.Meta(ge=-2, le=1_000_000)]
_Images = Annotated[list[str], msgspec.Meta(max_length=64)]
_AT_ONCE = 2048  # texts that an engine gets at once


class Body(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Base of requests and their parts."""


class Options(Body, kw_only=True):
    """How to answer. The second group has no effect here: modeld settles such things itself.

    `num_ctx` is the context to load the model with, at least. `num_predict` is the longest answer
    in tokens; 0 and less are no limit. Less than 0 is no `top_k`, and a random `seed`.
    """

    num_ctx: Annotated[float, msgspec.Meta(ge=1, le=2**24)] | None = None
    num_predict: _Tokens | None = None
    seed: int | float | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_k: Annotated[float, msgspec.Meta(ge=-1, le=100_000)] | None = None
    top_p: _Share | None = None
    min_p: _Share | None = None
    repeat_penalty: Annotated[float, msgspec.Meta(gt=0, le=2)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    stop: _Stop | Annotated[list[_Stop], msgspec.Meta(max_length=64)] | None = None

    numa: bool | None = None
    num_batch: float | None = None
    num_gpu: float | None = None
    main_gpu: float | None = None
    low_vram: bool | None = None
    f16_kv: bool | None = None
    logits_all: bool | None = None
    vocab_only: bool | None = None
    use_mmap: bool | None = None
    use_mlock: bool | None = None
    embedding_only: bool | None = None
    num_thread: float | None = None
    num_keep: float | None = None
    tfs_z: float | None = None
    typical_p: float | None = None
    repeat_last_n: float | None = None
    mirostat: float | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    penalize_newline: bool | None = None
    penalize_nl: bool | None = None
    draft_num_predict: float | None = None
    num_gqa: float | None = None
    rope_frequency_base: float | None = None
    rope_frequency_scale: float | None = None
    new_topic_penalty: float | None = None


class Asking(Body, kw_only=True):
    """Base of requests that hold a model.

    `keep_alive` is how long it stays in memory afterwards: seconds or "5m"; 0 unloads it, less than
    0 keeps it. `priority` is modeld's own.
    """

    model: str
    options: Options | None = None
    keep_alive: int | float | str | None = None
    priority: Priority | None = None

    def terms(self, record: ModelRecord) -> Terms:
        """Return what is said of the model. Raises InvalidRequest.

        A context that is longer than the model's own means that: clients ask all models for one.
        """
        wanted = self.options.num_ctx if self.options else None
        length = None if wanted is None else int(wanted)
        most = record.artifact.context_length if record.artifact else 0
        return Terms(
            keep_alive_s=None
            if self.keep_alive is None
            else duration(self.keep_alive, "keep_alive"),
            context_length=min(length, most) if length and most else length,
            priority=self.priority or Priority.INTERACTIVE,
        )

    @property
    def unloads(self) -> bool:
        """Whether the model is to leave at once."""
        return self.keep_alive is not None and duration(self.keep_alive, "keep_alive") == 0


class Generating(Asking, kw_only=True):
    """What chat and generate share. `format` is "json" or a JSON schema.

    `think` is whether a model thinks before it answers, and how much; None leaves it to the model.
    """

    stream: bool | None = None
    format: Literal["", "json"] | dict[str, Any] | None = None
    think: bool | Effort | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    truncate: bool | None = None
    shift: bool | None = None

    @property
    def streams(self) -> bool:
        """Whether the answer is sent in pieces, as it is unless somebody says otherwise."""
        return self.stream is not False

    @property
    def effort(self) -> str | None:
        """How much the model is to think, as backends take it."""
        if isinstance(self.think, Effort):
            return self.think.to_backend
        return None if self.think is None else "medium" if self.think else "none"

    def sampling(self) -> Sampling:
        """Return the fields that engines get."""
        options = self.options or Options()
        stop = [options.stop] if isinstance(options.stop, str) else options.stop or []
        limit = int(options.num_predict or 0)
        seed = None if options.seed is None or options.seed < 0 else int(options.seed) % SEEDS
        schema: dict[str, Any] | None = None
        if self.format:
            schema = {} if isinstance(self.format, str) else self.format
        return Sampling(
            max_tokens=limit if limit > 0 else None,
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=None if options.top_k is None else max(0, int(options.top_k)),
            min_p=options.min_p,
            seed=seed,
            presence_penalty=options.presence_penalty,
            frequency_penalty=options.frequency_penalty,
            repeat_penalty=options.repeat_penalty,
            stop=tuple(each for each in stop if each),
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            json_schema=schema,
        )


class ChatBody(Generating, kw_only=True):
    """Body of POST /api/chat. Without messages it loads the model, or unloads it."""

    messages: Annotated[list[Message], msgspec.Meta(max_length=10_000)] | None = None
    tools: Annotated[list[Tool], msgspec.Meta(max_length=128)] | None = None

    def to_backend(self) -> ChatRequest:
        """Return the request as backends take it. Raises InvalidRequest."""
        return ChatRequest(
            messages=to_backend(self.messages or ()),
            tools=tuple(tool.to_backend() for tool in self.tools or ()),
            parallel_tool_calls=True,
            reasoning_effort=self.effort,
            sampling=self.sampling(),
        )


class GenerateBody(Generating, kw_only=True):
    """Body of POST /api/generate. Without a prompt it loads the model, or unloads it.

    `raw` goes on from the prompt as it is; with a `suffix`, the answer is what goes in between. A
    `template` makes the prompt of all three in place of the model's own. No answer has a `context`,
    so that there is none to send back.
    """

    prompt: str = ""
    suffix: str | None = None
    system: str | None = None
    template: Annotated[str, msgspec.Meta(max_length=65_536)] | None = None
    context: Annotated[list[int], msgspec.Meta(max_length=0)] | None = None
    raw: bool | None = None
    images: _Images | None = None
    width: None = None
    height: None = None
    steps: None = None

    def to_backend(self) -> ChatRequest | CompleteRequest:
        """Return the request as backends take it. Raises InvalidRequest."""
        if self.template and not self.raw:
            self._refuse("template", "images")
            values = {
                "System": self.system or "",
                "Prompt": self.prompt,
                "Suffix": self.suffix or "",
            }
            prompt = templates.render(self.template, values)
            return CompleteRequest(prompt=prompt, sampling=self.sampling())
        if self.raw or self.suffix:
            self._refuse("raw or suffix", "images", "system", "template")
            return CompleteRequest(
                prompt=self.prompt, suffix=self.suffix or None, sampling=self.sampling()
            )
        said: Any = self.prompt
        if self.images:
            urls = [{"type": "image_url", "image_url": {"url": image_url(i)}} for i in self.images]
            said = [{"type": "text", "text": self.prompt}, *urls]
        messages = [{"role": "system", "content": self.system}] if self.system else []
        messages.append({"role": "user", "content": said})
        return ChatRequest(
            messages=tuple(messages), reasoning_effort=self.effort, sampling=self.sampling()
        )

    def _refuse(self, beside: str, *fields: str) -> None:
        for field in fields:
            if getattr(self, field):
                raise InvalidRequest(f"{field}: not with {beside}", param=field)


class EmbedBody(Asking, kw_only=True):
    """Body of POST /api/embed: no text has the model loaded.

    `truncate` cuts texts that are too long for the model.
    """

    input: str | Annotated[list[str], msgspec.Meta(max_length=100_000)] | None = None
    truncate: bool | None = None
    dimensions: Annotated[int, msgspec.Meta(ge=0, le=65_536)] | None = None

    def to_backend(self) -> list[EmbedRequest]:
        """Return the requests as backends take them, so many texts at a time; none for no text."""
        given = [self.input] if isinstance(self.input, str) and self.input else self.input
        inputs = tuple(given or ())
        return [
            EmbedRequest(
                inputs=inputs[start : start + _AT_ONCE],
                dimensions=self.dimensions or None,
                truncate=self.truncate is not False,
            )
            for start in range(0, len(inputs), _AT_ONCE)
        ]


class EmbeddingsBody(Asking, kw_only=True):
    """Body of POST /api/embeddings, the older form of /api/embed."""

    prompt: str


class NameBody(Body, kw_only=True):
    """What names a model: `name` is the older word for it."""

    model: str = ""
    name: str = ""

    @property
    def asked(self) -> str:
        """The name that is given. Raises InvalidRequest without one."""
        if name := self.model or self.name:
            return name
        raise InvalidRequest("model: the name of a model is missing", param="model")


class ShowBody(NameBody, kw_only=True):
    """Body of POST /api/show. All but the name is without effect: all that is known is shown."""

    verbose: bool | None = None
    system: str | None = None
    template: str | None = None
    options: dict[str, Any] | None = None


class PullBody(NameBody, kw_only=True):
    """Body of POST /api/pull. Only `stream` has an effect: addresses and settings say the rest."""

    insecure: bool | None = None
    username: str | None = None
    password: str | None = None
    stream: bool | None = None


class CopyBody(Body, kw_only=True):
    """Body of POST /api/copy."""

    source: str
    destination: str
