"""The protocol that every backend follows, and its error."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import ClassVar, Protocol

from backends.contract.answers import Classes, Count, Delta, Done, Embeddings, Scores
from backends.contract.machine import Hardware, Probe
from backends.contract.model import (
    Artifact,
    Fit,
    LoadedModel,
    LoadOptions,
    LoadSpec,
    MemoryEstimate,
    SavedConversation,
)
from backends.contract.options import Option
from backends.contract.requests import (
    ChatRequest,
    ClassifyRequest,
    CompleteRequest,
    CountRequest,
    EmbedRequest,
    RerankRequest,
)

Progress = Callable[[float], None]
Cancelled = Callable[[], bool]
Generation = Generator[Delta, None, Done]


class Backend(Protocol):
    """An adapter to one inference engine. One instance holds one loaded model.

    Importing the backend's module must not import the engine: `fit` and `estimate` run in the
    daemon, everything else in a child process. Methods are synchronous. For each task that
    `LoadedModel.tasks` announces, a backend also has the method of the protocol below that is named
    for it; those may be called from `LoadedModel.slots` threads at once.
    """

    name: ClassVar[str]
    formats: ClassVar[frozenset[str]]
    # The Python distribution of the engine: what its prober found holds until its version changes.
    # Empty: ask at every start.
    distribution: ClassVar[str]
    # The settings in LoadOptions.engine that it knows.
    options: ClassVar[Mapping[str, Option]]

    @classmethod
    def probe(cls) -> Probe:
        """Import the engine and say what it can do here. Called in a short-lived child.

        Never raises for an engine that is missing or broken: that is a `Probe` with a reason.
        """
        ...

    @classmethod
    def fit(cls, artifact: Artifact, probe: Probe, hardware: Hardware) -> Fit:
        """Say how well this engine suits `artifact` on `hardware`. Pure."""
        ...

    @classmethod
    def estimate(cls, artifact: Artifact, options: LoadOptions) -> MemoryEstimate:
        """Settle what `options` leaves open and say what such a load will need. Pure."""
        ...

    def load(self, spec: LoadSpec, progress: Progress) -> LoadedModel:
        """Load the model. Called once. `progress` takes fractions of 1, if the engine has them.

        Raises BackendError("load_failed", …) with what the engine said.
        """
        ...

    def close(self) -> None:
        """Free the model. May be called twice, and before `load`."""
        ...


class Chats(Backend, Protocol):
    """A backend for Task.CHAT, and for Task.VISION if images may be among the messages."""

    def chat(self, request: ChatRequest, cancelled: Cancelled) -> Generation:
        """Answer `request`: yield each Delta, return the Done.

        Ends within one token, or one prefill batch of at most 1 s, once `cancelled()` is true, and
        then returns a Done whose finish_reason is `cancelled`. Raises BackendError.
        """
        ...


class Counts(Backend, Protocol):
    """A backend for Task.CHAT that can tell how long a prompt is without reading it."""

    def count(self, request: CountRequest, cancelled: Cancelled) -> Count:
        """Return the tokens of the chat's prompt, as its own template and tokenizer make them.

        The prompt may be longer than the context. Raises BackendError for what `Chats.chat` would
        refuse, and "context_length_exceeded" for a prompt that is too long to be tokenized.
        """
        ...


class Completes(Backend, Protocol):
    """A backend for Task.COMPLETE, and for Task.INFILL if a suffix may be given."""

    def complete(self, request: CompleteRequest, cancelled: Cancelled) -> Generation:
        """Go on from the request's text, under the same rules as `Chats.chat`."""
        ...


class Embeds(Backend, Protocol):
    """A backend for Task.EMBED."""

    def embed(self, request: EmbedRequest, cancelled: Cancelled) -> Embeddings:
        """Return a vector for each input.

        Ends within 1 s once `cancelled()` is true, with BackendError("cancelled").
        """
        ...


class Reranks(Backend, Protocol):
    """A backend for Task.RERANK."""

    def rerank(self, request: RerankRequest, cancelled: Cancelled) -> Scores:
        """Return a score for each document, under the same rules as `Embeds.embed`."""
        ...


class Classifies(Backend, Protocol):
    """A backend for Task.CLASSIFY."""

    def classify(self, request: ClassifyRequest, cancelled: Cancelled) -> Classes:
        """Return the labels of each input, under the same rules as `Embeds.embed`."""
        ...


class Resumes(Backend, Protocol):
    """A backend whose conversations outlive an unload: their KV state is saved and restored.

    It may have these for any model, and saves nothing of those it can't.
    """

    def save_state(self, folder: str, limit_bytes: int) -> tuple[SavedConversation, ...]:
        """Write each conversation that is in the KV cache into a new file of its own in `folder`.

        The longest come first, as long as all files together have at most `limit_bytes`. A file has
        mode 0600 and its name once it is whole; the folder is made if it is missing. What can't be
        saved is left out. Called when no request runs, and none is started before it returns.
        Raises BackendError if there is something to save and nothing could be.
        """
        ...

    def restore_state(
        self, folder: str, conversations: Sequence[SavedConversation]
    ) -> tuple[str, ...]:
        """Go on from `conversations`, the most wanted first, as many as there are slots.

        Called once, right after `load`. A file that is missing, changed (size, SHA-256), or that
        the engine refuses is left out, never an error; the next one has its slot then. Returns the
        names of those restored.
        """
        ...
