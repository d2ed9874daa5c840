"""The protocol that every backend follows, and its error."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import ClassVar, Protocol

from backends.contract.answers import Classes, Delta, Done, Embeddings, Scores
from backends.contract.machine import Hardware, Probe
from backends.contract.model import (
    Artifact,
    Fit,
    LoadedModel,
    LoadOptions,
    LoadSpec,
    MemoryEstimate,
)
from backends.contract.options import Option
from backends.contract.requests import (
    ChatRequest,
    ClassifyRequest,
    CompleteRequest,
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
