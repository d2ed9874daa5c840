"""The Backend for models that run elsewhere. Knows no HTTP: the client does.

All requests of a worker share one event loop, on a thread of its own, and so their connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from backends.contract import (
    Artifact,
    BackendError,
    Cancelled,
    ChatRequest,
    CompleteRequest,
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
    Placement,
    Probe,
    Progress,
    RerankRequest,
    Scores,
    Task,
    check_options,
)
from backends.remote import bodies

if TYPE_CHECKING:
    from backends.remote.client import Client

T = TypeVar("T")
# A listing does not say what a model can do: all is passed on, and so is a refusal.
_TASKS = (Task.CHAT, Task.COMPLETE, Task.INFILL, Task.VISION, Task.EMBED, Task.RERANK)
_SLOTS = 16
_WORKER_BYTES = 32 * 1024 * 1024  # 24 MB were measured after a load, 31 with 16 TLS streams
_POLL_S = 0.05  # how soon a cancellation is seen
_LISTED_NAMES = 5
UPSTREAM = "remote.upstream"  # metadata of an artifact: the upstream's name in the settings


class Remote:
    """See the module."""

    name: ClassVar[str] = "remote"
    formats: ClassVar[frozenset[str]] = frozenset({"remote"})
    distribution: ClassVar[str] = ""
    options: ClassVar[Mapping[str, Option]] = {}

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._client: Client | None = None
        self._model = ""

    @classmethod
    def probe(cls) -> Probe:
        """See Backend.probe."""
        return Probe(backend=cls.name, available=True)

    @classmethod
    def fit(cls, artifact: Artifact, probe: Probe, hardware: Hardware) -> Fit:
        """See Backend.fit."""
        upstream = artifact.metadata.get(UPSTREAM, "")
        return Fit(score=50, tasks=_TASKS, reason=f"the upstream {upstream!r} runs it")

    @classmethod
    def estimate(cls, artifact: Artifact, options: LoadOptions) -> MemoryEstimate:
        """See Backend.estimate. The context is the upstream's, whatever was asked for."""
        check_options(cls.name, cls.options, options.engine)
        return MemoryEstimate(
            context_length=artifact.context_length,
            slots=options.slots or _SLOTS,
            parts={"runtime": _WORKER_BYTES},
            placement=Placement(reason="it runs on another computer"),
        )

    def load(self, spec: LoadSpec, progress: Progress) -> LoadedModel:
        """See Backend.load. Makes sure that the upstream answers, and has the model."""
        from backends.remote import answers
        from backends.remote.client import Client, shown

        upstream = spec.upstream
        if upstream is None:
            raise BackendError("load_failed", "no upstream was given for this model")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

        async def open_client() -> Client:
            return Client(upstream)

        try:
            self._client = self._run(open_client())
            listed = self._run(self._client.get("/v1/models", answers.listed))
        except BackendError as error:
            self.close()
            raise BackendError("load_failed", error.message) from error
        if upstream.model not in listed:
            self.close()
            names = ", ".join(list(listed)[:_LISTED_NAMES]) or "none at all"
            raise BackendError(
                "load_failed",
                f"the upstream {shown(upstream.url)} does not list {upstream.model!r}; of its "
                f"{len(listed)} models, the first are: {names}",
            )
        self._model = upstream.model
        return LoadedModel(
            tasks=_TASKS,
            slots=spec.slots,
            context_length=listed[upstream.model] or spec.context_length,
            engine_version="",
        )

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        assert self._loop is not None  # load comes first
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def chat(self, request: ChatRequest, cancelled: Cancelled) -> Generation:
        """See Chats.chat."""
        return self._generate("/v1/chat/completions", bodies.chat(request, self._model), cancelled)

    def complete(self, request: CompleteRequest, cancelled: Cancelled) -> Generation:
        """See Completes.complete."""
        return self._generate("/v1/completions", bodies.complete(request, self._model), cancelled)

    def _generate(self, path: str, body: dict[str, Any], cancelled: Cancelled) -> Generation:
        assert self._client is not None  # load comes first
        pieces = self._client.generate(path, body)
        try:
            while True:
                piece = self._run(_unless(cancelled, _next(pieces)))
                if piece is None:
                    return Done(finish_reason="cancelled")
                if isinstance(piece, Done):
                    return piece
                yield piece
        finally:
            self._run(_close(pieces))

    def embed(self, request: EmbedRequest, cancelled: Cancelled) -> Embeddings:
        """See Embeds.embed. What is too long is for the upstream to cut or to refuse."""
        from backends.remote import answers

        return self._ask(
            "/v1/embeddings",
            bodies.embed(request, self._model),
            lambda answer: answers.embeddings(answer, len(request.inputs)),
            cancelled,
        )

    def rerank(self, request: RerankRequest, cancelled: Cancelled) -> Scores:
        """See Reranks.rerank. What is too long is for the upstream to cut or to refuse."""
        from backends.remote import answers

        return self._ask(
            "/v1/rerank",
            bodies.rerank(request, self._model),
            lambda answer: answers.scores(answer, len(request.documents)),
            cancelled,
        )

    def _ask(
        self,
        path: str,
        body: dict[str, Any],
        read: Callable[[object], T],
        cancelled: Cancelled,
    ) -> T:
        assert self._client is not None  # load comes first
        result = self._run(_unless(cancelled, self._client.post(path, body, read)))
        if result is None:
            raise BackendError("cancelled", "the request was cancelled")
        return result

    def close(self) -> None:
        """See Backend.close."""
        if self._loop is None:
            return
        if self._client is not None:
            self._run(self._client.aclose())
            self._client = None
        self._loop.call_soon_threadsafe(self._loop.stop)
        if self._thread is not None:
            self._thread.join()
        self._loop.close()
        self._loop = None


async def _next(pieces: AsyncGenerator[Delta | Done]) -> Delta | Done:
    return await anext(pieces)


async def _close(pieces: AsyncGenerator[Delta | Done]) -> None:
    await pieces.aclose()


async def _unless(cancelled: Cancelled, work: Coroutine[Any, Any, T]) -> T | None:
    """Return the result of `work`, or None once `cancelled()` is true and the work has ended."""
    task = asyncio.ensure_future(work)
    while not cancelled():
        done, _ = await asyncio.wait([task], timeout=_POLL_S)
        if done:
            return task.result()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, BackendError):
        await task
    return None
