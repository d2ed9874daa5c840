"""The Backend over xllamacpp's server engine: continuous batching over slots, prompt cache.

Owns what each task asks of the engine, and what is refused before the engine sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any, ClassVar

from backends import builds, gguf, images, roles, tools, vectors
from backends.contract import (
    Artifact,
    BackendError,
    Cancelled,
    ChatRequest,
    CompleteRequest,
    Count,
    CountRequest,
    Delta,
    Done,
    Embeddings,
    EmbedRequest,
    Fit,
    Generation,
    Hardware,
    LoadedModel,
    LoadOptions,
    LoadSpec,
    MemoryEstimate,
    Option,
    Probe,
    Progress,
    RerankRequest,
    Sampling,
    SavedConversation,
    Scores,
    Usage,
)
from backends.room import check_room, context_exceeded
from backends.xllamacpp import bodies
from backends.xllamacpp.chunks import chunks
from backends.xllamacpp.listener import Listener
from backends.xllamacpp.parameters import FOOTPRINT, parameters
from backends.xllamacpp.states import States

_DISTRIBUTION = "xllamacpp"


class Xllamacpp:
    """See the module. Thread-safe: the engine batches what its slots ask for."""

    name: ClassVar[str] = "xllamacpp"
    formats: ClassVar[frozenset[str]] = frozenset({"gguf"})
    distribution: ClassVar[str] = _DISTRIBUTION
    options: ClassVar[Mapping[str, Option]] = gguf.OPTIONS
    max_slots: ClassVar[int] = 64

    def __init__(self) -> None:
        self._server: Any = None
        self._listener = Listener()
        self._states: States | None = None
        self._context_length = 0
        self._slots = 0
        self._infill_tokens: tuple[int, int, int] | None = None
        self._chat_template = ""

    @classmethod
    def probe(cls) -> Probe:
        """See Backend.probe."""
        try:
            import xllamacpp
        except Exception as error:  # noqa: BLE001  a broken engine is a reason, not a crash
            return Probe(
                backend=cls.name,
                available=False,
                reason=f"xllamacpp cannot be imported ({error}); install it with: "
                "pip install xllamacpp",
            )
        devices = tuple(device["name"] for device in xllamacpp.get_device_info())
        return Probe(
            backend=cls.name,
            available=True,
            version=version(_DISTRIBUTION),
            devices=devices,
            features=builds.instruction_sets(str(xllamacpp.get_system_info())),
            gpu_vendors=builds.gpu_vendors(devices),
        )

    @classmethod
    def fit(cls, artifact: Artifact, probe: Probe, hardware: Hardware) -> Fit:
        """See Backend.fit: preferred for GGUF on a CPU."""
        bonus, where = builds.gpu_bonus(probe, hardware)
        return Fit(
            score=90 + bonus,
            tasks=gguf.tasks(artifact),
            reason=f"xllamacpp {probe.version}: batches concurrent requests, prompt cache, tool "
            f"calls{where}",
        )

    @classmethod
    def estimate(cls, artifact: Artifact, options: LoadOptions) -> MemoryEstimate:
        """See Backend.estimate."""
        gguf.check(cls.name, options.engine)
        return gguf.estimate(artifact, options, FOOTPRINT, max_slots=cls.max_slots)

    def load(self, spec: LoadSpec, progress: Progress) -> LoadedModel:
        """See Backend.load."""
        if spec.placement.gpu_layers == 0:
            builds.hide_gpus()
        import xllamacpp

        params = parameters(spec, gguf.check(self.name, spec.engine), self._listener)
        try:
            self._server = xllamacpp.Server(params)
            # An engine that is closed before its main loop runs never ends; this asks the loop.
            self._server.handle_metrics()
        except Exception as error:
            raise BackendError("load_failed", str(error)) from error
        self._context_length = spec.context_length
        self._slots = spec.slots
        self._infill_tokens = gguf.infill_tokens(spec.artifact)
        self._chat_template = spec.artifact.chat_template
        self._states = States(self._listener, spec)
        return LoadedModel(
            tasks=gguf.tasks(spec.artifact),
            slots=spec.slots,
            context_length=spec.context_length,
            engine_version=version(_DISTRIBUTION),
        )

    def chat(self, request: ChatRequest, cancelled: Cancelled) -> Generation:
        """See Chats.chat."""
        if forced := tools.must_call(request):
            return (yield from self._call(tools.insisting(request, forced), cancelled))
        return (yield from self._chat(request, cancelled))

    def _chat(self, request: ChatRequest, cancelled: Cancelled) -> Generation:
        refusals: list[BackendError] = []
        for body in self._chat_bodies(request):
            handle = self._server.handle_chat_completions
            generation = self._generate(handle, body, request.sampling, cancelled)
            if request.tools and not request.parallel_tool_calls:
                generation = tools.first_call_only(generation)
            try:
                return (yield from generation)
            except roles.Refused as error:  # before anything was said
                refusals.append(error)
        raise refusals[0]

    def _chat_bodies(self, request: ChatRequest) -> Iterator[dict[str, Any]]:
        """Yield what the engine is asked, then the same for templates that refused the former."""
        if request.tools and request.tool_choice == "auto" and "tools" not in self._chat_template:
            raise BackendError(
                "invalid_request",
                "the chat template of this model knows no tools, so it can't choose to call one: "
                "set tool_choice to `required` or to a function",
            )
        gguf.refuse_hopeless(request, self._context_length)
        images.check(request.messages)
        body = bodies.chat_body(request)
        spelled_out = tools.spelled_out(request.messages, self._chat_template)
        for messages in roles.variants(spelled_out):
            yield body | {"messages": messages}

    def count(self, request: CountRequest, cancelled: Cancelled) -> Count:
        """See Counts.count."""
        chat = request.chat
        if forced := tools.must_call(chat):
            chat = tools.insisting(chat, forced)
        refusals: list[BackendError] = []
        for body in self._chat_bodies(chat):
            try:
                answer = self._listener.post("/v1/chat/completions/input_tokens", body)
            except roles.Refused as error:
                refusals.append(error)
            else:
                return Count(tokens=answer["input_tokens"])
        raise refusals[0]

    def _call(self, request: ChatRequest, cancelled: Cancelled) -> Generation:
        """Answer with a call of a tool; with nothing if it was cut short."""
        pieces = []
        generation = self._chat(request, cancelled)
        while True:
            try:
                pieces.append(next(generation).content)
            except StopIteration as end:
                done: Done = end.value
                break
        call = tools.parse_call("".join(pieces)) if done.finish_reason == "stop" else None
        if call is None:
            return done
        yield Delta(tool_calls=(call,))
        return replace(done, finish_reason="tool_calls")

    def complete(self, request: CompleteRequest, cancelled: Cancelled) -> Generation:
        """See Completes.complete."""
        gguf.refuse_hopeless(request, self._context_length)
        body = bodies.complete_body(request, self._infill_tokens)
        handle = self._server.handle_completions
        return (yield from self._generate(handle, body, request.sampling, cancelled))

    def _generate(
        self,
        handle: Callable[[dict[str, Any], Callable[[dict[str, Any]], bool]], None],
        body: dict[str, Any],
        sampling: Sampling,
        cancelled: Cancelled,
    ) -> Generation:
        """Yield the deltas of the engine's chunks and return the end.

        The engine calls back once a token and, since `return_progress` is set, once a batch of the
        prompt: those are the moments at which a cancelled request ends.
        """
        final: dict[str, Any] = {}
        finish_reason = stopped_by = ""
        for chunk in chunks(handle, body, cancelled):
            if "error" in chunk:
                raise bodies.error(chunk["error"])
            if tokens := bodies.prompt_tokens(chunk):
                check_room(tokens, sampling, self._context_length)
            final = chunk if "usage" in chunk else final
            stopped_by = bodies.stopping_word(chunk) or stopped_by
            for choice in chunk.get("choices", ()):
                finish_reason = choice.get("finish_reason") or finish_reason
                if (delta := bodies.delta(choice, sampling)) is not None:
                    yield delta
        if cancelled() and not final:
            return Done(finish_reason="cancelled")
        if not finish_reason:
            raise BackendError("engine_error", "xllamacpp ended the answer without a reason")
        return bodies.done(finish_reason, final, stopped_by)

    def embed(self, request: EmbedRequest, cancelled: Cancelled) -> Embeddings:
        """See Embeds.embed. As many texts go to the engine at once as it has slots."""
        texts = self._fitting(request.inputs, truncate=request.truncate)
        packed: list[bytes] = []
        tokens = 0
        for start in range(0, len(texts), self._slots):
            _check_cancelled(cancelled)
            answer = self._server.handle_embeddings({"input": texts[start : start + self._slots]})
            if "error" in answer:
                raise bodies.error(answer["error"])
            tokens += bodies.usage(answer).prompt_tokens
            found = sorted(answer["data"], key=lambda entry: int(entry["index"]))
            packed += [vectors.pack(entry["embedding"], request.dimensions) for entry in found]
        return Embeddings(
            vectors=tuple(packed),
            dimensions=len(packed[0]) // 4 if packed else 0,
            usage=Usage(prompt_tokens=tokens),
        )

    def rerank(self, request: RerankRequest, cancelled: Cancelled) -> Scores:
        """See Reranks.rerank."""
        documents = self._fitting(request.documents, truncate=request.truncate, query=request.query)
        scores = [0.0] * len(documents)
        tokens = 0
        for start in range(0, len(documents), self._slots):
            _check_cancelled(cancelled)
            batch = documents[start : start + self._slots]
            answer = self._server.handle_rerank({"query": request.query, "documents": batch})
            if "error" in answer:
                raise bodies.error(answer["error"])
            tokens += bodies.usage(answer).prompt_tokens
            for entry in answer["results"]:
                scores[start + entry["index"]] = entry["relevance_score"]
        return Scores(scores=tuple(scores), usage=Usage(prompt_tokens=tokens))

    def _fitting(self, texts: tuple[str, ...], *, truncate: bool, query: str = "") -> list[str]:
        """Return the texts, those that are too long cut or refused, as `truncate` says.

        `query` takes its share of every text's room. Raises BackendError.
        """
        marks = len(self._tokens("", special=True))  # at the start and the end of every text
        used = marks
        if query:
            used += len(self._tokens(query)) + 2  # and between the query and the text
        room = self._context_length - used
        fitting = []
        for text in texts:
            if not text:
                raise BackendError("invalid_request", "one of the texts is empty")
            if len(text.encode()) > room:  # else it fits: a token has at least one byte
                tokens = self._tokens(text)
                if len(tokens) > room and (not truncate or room < 1):
                    raise context_exceeded(len(tokens) + used, self._context_length)
                if len(tokens) > room:
                    text = self._cut(tokens, room)  # noqa: PLW2901  the text that is computed
            fitting.append(text)
        return fitting

    def _cut(self, tokens: list[int], room: int) -> str:
        """Return the text of the first `room` tokens, or of some less if it has more on its own."""
        for keep in range(room, 0, -max(1, room // 16)):
            cut = str(self._listener.post("/detokenize", {"tokens": tokens[:keep]})["content"])
            if len(self._tokens(cut)) <= room:
                return cut
        raise BackendError("engine_error", "xllamacpp can't cut this text")

    def _tokens(self, text: str, *, special: bool = False) -> list[int]:
        # What is beyond this does not fit whatever it is, and would take long to tokenize.
        text = text[: gguf.MAX_CHARS_PER_TOKEN * self._context_length]
        body = {"content": text, "add_special": special}
        return list(self._listener.post("/tokenize", body)["tokens"])

    def save_state(self, folder: str, limit_bytes: int) -> tuple[SavedConversation, ...]:
        """See Resumes.save_state."""
        return self._states.save(folder, limit_bytes) if self._states else ()

    def restore_state(
        self, folder: str, conversations: Sequence[SavedConversation]
    ) -> tuple[str, ...]:
        """See Resumes.restore_state."""
        return self._states.restore(folder, conversations) if self._states else ()

    def close(self) -> None:
        """See Backend.close."""
        self._server = self._states = None
        self._listener.close()


def _check_cancelled(cancelled: Cancelled) -> None:
    if cancelled():
        raise BackendError("cancelled", "the request was cancelled")
