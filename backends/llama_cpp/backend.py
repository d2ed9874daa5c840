"""The Backend over llama-cpp-python's low-level interface: continuous batching over slots.

Owns what each task asks of the engine, and what is refused before the engine sees it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from typing import ClassVar

from backends import builds, gguf, tools, vectors
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
    SavedConversation,
    Scores,
    Task,
    Usage,
)
from backends.llama_cpp import states
from backends.llama_cpp.engine import Engine
from backends.llama_cpp.model import FOOTPRINT, Model
from backends.llama_cpp.pooling import Pooler
from backends.llama_cpp.slots import Prompt
from backends.llama_cpp.templates import ChatTemplate
from backends.llama_cpp.texts import Texts

_DISTRIBUTION = "llama-cpp-python"
_INSTALL = f"pip install {_DISTRIBUTION} (it compiles for some minutes)"


class LlamaCpp:
    """See the module. Thread-safe: what requests ask for is computed in common batches."""

    name: ClassVar[str] = "llama_cpp"
    formats: ClassVar[frozenset[str]] = frozenset({"gguf"})
    distribution: ClassVar[str] = _DISTRIBUTION
    options: ClassVar[Mapping[str, Option]] = gguf.OPTIONS
    max_slots: ClassVar[int] = 64

    def __init__(self) -> None:
        self._model: Model | None = None
        self._engine: Engine | None = None
        self._pooler: Pooler | None = None
        self._texts: Texts | None = None
        self._template: ChatTemplate | None = None
        self._chat_template = ""
        self._context_length = 0
        self._infill_tokens: tuple[int, int, int] | None = None

    @classmethod
    def probe(cls) -> Probe:
        """See Backend.probe."""
        try:
            import llama_cpp
        except Exception as error:  # noqa: BLE001  a broken engine is a reason, not a crash
            return Probe(
                backend=cls.name,
                available=False,
                reason=f"llama-cpp-python cannot be imported ({error}); install it with: "
                f"{_INSTALL}",
            )
        said = llama_cpp.llama_print_system_info().decode("utf-8", "replace")
        devices = _devices(said)
        return Probe(
            backend=cls.name,
            available=True,
            version=version(_DISTRIBUTION),
            devices=devices,
            features=builds.instruction_sets(said),
            gpu_vendors=(
                builds.gpu_vendors(devices) if llama_cpp.llama_supports_gpu_offload() else ()
            ),
        )

    @classmethod
    def fit(cls, artifact: Artifact, probe: Probe, hardware: Hardware) -> Fit:
        """See Backend.fit."""
        bonus, where = builds.gpu_bonus(probe, hardware)
        return Fit(
            score=70 + bonus,
            tasks=gguf.tasks(artifact),
            reason=f"llama-cpp-python {probe.version}: batches concurrent requests, prompt cache"
            f"{where}",
        )

    @classmethod
    def estimate(cls, artifact: Artifact, options: LoadOptions) -> MemoryEstimate:
        """See Backend.estimate."""
        gguf.check(cls.name, options.engine)
        return gguf.estimate(artifact, options, FOOTPRINT, max_slots=cls.max_slots)

    def load(self, spec: LoadSpec, progress: Progress) -> LoadedModel:
        """See Backend.load."""
        options = gguf.check(self.name, spec.engine)
        self._model = model = Model(spec, options, progress)
        self._context_length = spec.context_length
        try:
            if model.pools:
                self._load_pooler(spec, model)
            else:
                self._load_template(spec, model)
                self._infill_tokens = self._known_infill_tokens(spec.artifact, model)
                self._engine = Engine(model, slots=spec.slots, context_length=spec.context_length)
        except BaseException:
            self.close()
            raise
        return LoadedModel(
            tasks=gguf.tasks(spec.artifact),
            slots=spec.slots,
            context_length=spec.context_length,
            engine_version=version(_DISTRIBUTION),
        )

    def _load_pooler(self, spec: LoadSpec, model: Model) -> None:
        # Positions beyond the trained ones do not exist for models that learned them.
        trained = spec.artifact.context_length or spec.context_length
        self._texts = Texts(model, min(spec.context_length, trained))
        ranks = gguf.tasks(spec.artifact) == (Task.RERANK,)
        outputs = 1 if ranks else int(model.engine.llama_model_n_embd_out(model.pointer))
        self._pooler = Pooler(model, outputs)

    def _load_template(self, spec: LoadSpec, model: Model) -> None:
        self._chat_template = spec.artifact.chat_template
        if self._chat_template:
            self._template = ChatTemplate(
                self._chat_template,
                bos=model.vocabulary.special_text(model.vocabulary.bos),
                eos=model.vocabulary.special_text(model.vocabulary.eos),
                image_marker=model.vision.marker if model.vision else "",
            )

    @staticmethod
    def _known_infill_tokens(artifact: Artifact, model: Model) -> tuple[int, int, int] | None:
        marks = gguf.infill_tokens(artifact)
        if marks is not None and not all(0 <= mark < model.vocabulary.size for mark in marks):
            raise BackendError(
                "load_failed",
                f"{artifact.path} names the tokens {marks} for infill, but has "
                f"{model.vocabulary.size} tokens: the file is broken",
            )
        return marks

    def chat(self, request: ChatRequest, cancelled: Cancelled) -> Generation:
        """See Chats.chat."""
        if forced := tools.must_call(request):
            return (yield from self._call(tools.insisting(request, forced), cancelled))
        return (yield from self._chat(request, cancelled))

    def _chat(self, request: ChatRequest, cancelled: Cancelled) -> Generation:
        _, engine = self._generating()
        with self._prompt(request) as prompt:
            return (yield from engine.generate(prompt, request.sampling, cancelled))

    @contextmanager
    def _prompt(self, request: ChatRequest) -> Iterator[Prompt]:
        model, _ = self._generating()
        if request.tools and request.tool_choice == "auto":
            raise BackendError(
                "invalid_request",
                "llama_cpp can't tell a call of a tool from text: set tool_choice to `required` or "
                "to a function, or load the model with the backend xllamacpp",
            )
        if self._template is None:
            raise BackendError("invalid_request", "this model has no chat template")
        gguf.refuse_hopeless(request, self._context_length)
        messages = tools.spelled_out(request.messages, self._chat_template)
        text, images = self._template.prompt(request, messages)
        if model.vision is not None and images:
            bos = model.vocabulary.special_text(model.vocabulary.bos)
            add_special = not (bos and text.startswith(bos))
            with model.vision.prompt(text, images, add_special=add_special) as prompt:
                yield prompt
        else:
            yield Prompt((self._chat_tokens(model, text),))

    def count(self, request: CountRequest, cancelled: Cancelled) -> Count:
        """See Counts.count."""
        chat = request.chat
        if forced := tools.must_call(chat):
            chat = tools.insisting(chat, forced)
        with self._prompt(chat) as prompt:
            return Count(tokens=prompt.tokens)

    @staticmethod
    def _chat_tokens(model: Model, text: str) -> list[int]:
        """Return the tokens of a rendered template, which may or may not begin with BOS itself."""
        vocabulary = model.vocabulary
        tokens = vocabulary.tokenize(text, add_special=False)
        if vocabulary.begins_with_bos and vocabulary.bos >= 0 and tokens[:1] != [vocabulary.bos]:
            tokens.insert(0, vocabulary.bos)
        return tokens or vocabulary.prompt("")

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
        model, engine = self._generating()
        gguf.refuse_hopeless(request, self._context_length)
        if request.suffix is None:
            tokens = model.vocabulary.prompt(request.prompt)
        elif self._infill_tokens is None:
            raise BackendError("invalid_request", "this model can't fill in: leave out `suffix`")
        else:
            tokens = model.vocabulary.infill(request.prompt, request.suffix, self._infill_tokens)
        return (yield from engine.generate(Prompt((tokens,)), request.sampling, cancelled))

    def embed(self, request: EmbedRequest, cancelled: Cancelled) -> Embeddings:
        """See Embeds.embed."""
        texts, pooler = self._pooling()
        read = [texts.single(text, truncate=request.truncate) for text in request.inputs]
        found = pooler.pool(read, cancelled)
        packed = tuple(vectors.pack(vector, request.dimensions) for vector in found)
        return Embeddings(
            vectors=packed,
            dimensions=len(packed[0]) // 4 if packed else 0,
            usage=_usage(read),
        )

    def rerank(self, request: RerankRequest, cancelled: Cancelled) -> Scores:
        """See Reranks.rerank."""
        texts, pooler = self._pooling()
        read = [
            texts.pair(request.query, document, truncate=request.truncate)
            for document in request.documents
        ]
        found = pooler.pool(read, cancelled)
        return Scores(scores=tuple(score for (score,) in found), usage=_usage(read))

    def save_state(self, folder: str, limit_bytes: int) -> tuple[SavedConversation, ...]:
        """See Resumes.save_state. Models that pool keep nothing."""
        model, engine = self._model, self._engine
        if model is None or engine is None:
            return ()
        return engine.call(lambda slots: states.save(model, slots, folder, limit_bytes))

    def restore_state(
        self, folder: str, conversations: Sequence[SavedConversation]
    ) -> tuple[str, ...]:
        """See Resumes.restore_state."""
        model, engine = self._model, self._engine
        if model is None or engine is None:
            return ()
        return engine.call(lambda slots: states.restore(model, slots, folder, conversations))

    def _generating(self) -> tuple[Model, Engine]:
        if self._model is None or self._engine is None:
            raise BackendError("engine_error", "no model that generates text is loaded")
        return self._model, self._engine

    def _pooling(self) -> tuple[Texts, Pooler]:
        if self._texts is None or self._pooler is None:
            raise BackendError("engine_error", "no model that reads whole texts is loaded")
        return self._texts, self._pooler

    def close(self) -> None:
        """See Backend.close."""
        for part in (self._engine, self._pooler, self._model):
            if part is not None:
                part.close()
        self._engine = self._pooler = self._texts = self._model = None


def _devices(system_info: str) -> tuple[str, ...]:
    """Return the names in `CUDA : … | CPU : …`: what the engine was built to compute on."""
    return tuple(re.findall(r"(\w+) : ", system_info))


def _usage(texts: list[list[int]]) -> Usage:
    return Usage(prompt_tokens=sum(len(tokens) for tokens in texts))
