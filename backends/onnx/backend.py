"""The Backend over onnxruntime, and over onnxruntime-genai for models that generate.

Owns what each task asks of a graph. Thread-safe: concurrent requests are computed in batches.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, ClassVar

from backends import builds
from backends.contract import (
    Artifact,
    BackendError,
    Cancelled,
    ChatRequest,
    Classes,
    ClassifyRequest,
    CompleteRequest,
    Count,
    CountRequest,
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
    Scores,
    Usage,
    check_options,
)
from backends.onnx import pooling, settings
from backends.onnx.batches import Batches
from backends.onnx.generation import Generator
from backends.onnx.session import Session
from backends.onnx.texts import Text, Texts

_DISTRIBUTION = "onnxruntime"
_TOKENIZER = "tokenizer.json"
_WARM_UP_TOKENS = 512


class Onnx:
    """See the module."""

    name: ClassVar[str] = "onnx"
    formats: ClassVar[frozenset[str]] = frozenset({"onnx"})
    distribution: ClassVar[str] = _DISTRIBUTION
    options: ClassVar[Mapping[str, Option]] = settings.OPTIONS

    def __init__(self) -> None:
        self._texts: Texts
        self._session: Session
        self._batches: Batches | None = None
        self._generator: Generator | None = None
        self._pooling = "mean"
        self._normalize = True
        self._labels: list[str] = []
        self._multi_label = False

    @classmethod
    def probe(cls) -> Probe:
        """See Backend.probe."""
        try:
            import onnxruntime
            import tokenizers  # noqa: F401
        except Exception as error:  # noqa: BLE001  a broken engine is a reason, not a crash
            return Probe(
                backend=cls.name,
                available=False,
                reason=f"onnxruntime or tokenizers cannot be imported ({error}); install them "
                f"with: {settings.INSTALL}",
            )
        devices = tuple(onnxruntime.get_available_providers())
        genai = importlib.util.find_spec("onnxruntime_genai") is not None
        return Probe(
            backend=cls.name,
            available=True,
            version=str(onnxruntime.__version__),
            devices=devices,
            features=("batching", settings.GENERATE) if genai else ("batching",),
            gpu_vendors=settings.gpu_vendors(devices),
        )

    @classmethod
    def fit(cls, artifact: Artifact, probe: Probe, hardware: Hardware) -> Fit:
        """See Backend.fit."""
        tasks = settings.tasks(artifact)
        if not tasks:
            return Fit(score=0, reason="its files do not say what it is for")
        if settings.generates(artifact) and settings.GENERATE not in probe.features:
            return Fit(
                score=0,
                reason="generation needs onnxruntime-genai; install it with: "
                f"{settings.INSTALL_GENAI}",
            )
        bonus, where = builds.gpu_bonus(probe, hardware)
        return Fit(
            score=80 + bonus,
            tasks=tasks,
            reason=f"onnxruntime {probe.version}: {', '.join(tasks)}{where}",
        )

    @classmethod
    def estimate(cls, artifact: Artifact, options: LoadOptions) -> MemoryEstimate:
        """See Backend.estimate."""
        return settings.estimate(artifact, options)

    def load(self, spec: LoadSpec, progress: Progress) -> LoadedModel:
        """See Backend.load."""
        import onnxruntime

        engine = check_options(self.name, self.options, spec.engine)
        length = settings.context_length(spec.artifact, spec.context_length)
        self._texts = Texts(_config(spec.artifact, _TOKENIZER), length)
        progress(0.1)
        if settings.generates(spec.artifact):
            self._generator = Generator(spec, length, self._texts)
        else:
            self._open(spec, engine, length)
        progress(1.0)
        return LoadedModel(
            tasks=settings.tasks(spec.artifact),
            slots=1 if self._generator else spec.slots,
            context_length=length,
            engine_version=str(onnxruntime.__version__),
        )

    def _open(self, spec: LoadSpec, engine: Mapping[str, Any], length: int) -> None:
        """Open a graph that reads whole texts, and try it out."""
        import onnxruntime

        artifact = spec.artifact
        self._session = Session(
            artifact.path,
            providers=settings.providers(
                onnxruntime.get_available_providers(),
                str(engine.get("provider", "auto")),
                spec.placement,
            ),
            threads=spec.threads,
            output=str(artifact.metadata.get("onnx.output", "")),
            padding_id=self._texts.padding_id(settings.fact(artifact, "pad_token_id")),
            fixed_length=settings.fact(artifact, "fixed_length"),
        )
        self._pooling = settings.pooling(artifact, engine)
        self._normalize = bool(
            engine.get("normalize", artifact.metadata.get("onnx.normalize", True))
        )
        self._labels = [str(label) for label in artifact.metadata.get("onnx.labels", ())]
        self._multi_label = artifact.metadata.get("onnx.multi_label") is True
        budget = settings.batch_tokens(artifact, spec.threads)
        self._warm_up(min(length, _WARM_UP_TOKENS), budget)
        self._batches = Batches(self._rows, self._session.new_run, budget)

    def _warm_up(self, length: int, budget: int) -> None:
        """Compute the largest batch that is usual: what it needs is taken and measured now."""
        word = self._texts.one("a", "a", truncate=True)
        ids = (word.ids * length)[:length]
        texts = [Text(ids, [0] * length)] * max(1, budget // length)
        try:
            rows = self._rows(texts, self._session.new_run())
        except Exception as error:
            raise BackendError("load_failed", f"onnxruntime cannot run it: {error}") from error
        if self._labels and len(rows[0]) != len(self._labels):
            raise BackendError(
                "load_failed",
                f"the model has {len(rows[0])} outputs, and config.json {len(self._labels)} labels",
            )

    def _rows(self, texts: Sequence[Text], run: Any) -> Sequence[Any]:
        output, mask = self._session.run(texts, run)
        rows: Sequence[Any] = (
            pooling.pool(output, mask, self._pooling) if output.ndim == 3 else output
        )
        return rows

    def _compute(self, texts: list[Text], cancelled: Cancelled) -> tuple[list[Any], Usage]:
        if self._batches is None:
            raise BackendError("engine_error", "no model is loaded")
        rows = self._batches.run(texts, cancelled)
        return rows, Usage(prompt_tokens=sum(len(text.ids) for text in texts))

    def embed(self, request: EmbedRequest, cancelled: Cancelled) -> Embeddings:
        """See Embeds.embed."""
        rows, usage = self._compute(self._singles(request, cancelled), cancelled)
        vectors = tuple(
            pooling.vector(row, request.dimensions, normalize=self._normalize) for row in rows
        )
        dimensions = len(vectors[0]) // 4 if vectors else 0
        return Embeddings(vectors=vectors, dimensions=dimensions, usage=usage)

    def rerank(self, request: RerankRequest, cancelled: Cancelled) -> Scores:
        """See Reranks.rerank. A score is from 0 to 1."""
        texts = []
        for number, document in enumerate(request.documents, start=1):
            _check(cancelled)
            what = f"document {number}"
            texts.append(self._texts.pair(request.query, document, what, truncate=request.truncate))
        rows, usage = self._compute(texts, cancelled)
        return Scores(scores=tuple(pooling.sigmoid(float(row[0])) for row in rows), usage=usage)

    def classify(self, request: ClassifyRequest, cancelled: Cancelled) -> Classes:
        """See Classifies.classify."""
        rows, usage = self._compute(self._singles(request, cancelled), cancelled)
        found = []
        for row in rows:
            scores = pooling.probabilities(row.tolist(), independent=self._multi_label)
            found.append(dict(zip(self._labels, scores, strict=True)))
        return Classes(labels=tuple(found), usage=usage)

    def _singles(self, request: EmbedRequest | ClassifyRequest, cancelled: Cancelled) -> list[Text]:
        texts = []
        for number, text in enumerate(request.inputs, start=1):
            _check(cancelled)
            texts.append(self._texts.one(text, f"text {number}", truncate=request.truncate))
        return texts

    def chat(self, request: ChatRequest, cancelled: Cancelled) -> Generation:
        """See Chats.chat."""
        assert self._generator is not None
        return (yield from self._generator.chat(request, cancelled))

    def count(self, request: CountRequest, cancelled: Cancelled) -> Count:
        """See Counts.count."""
        assert self._generator is not None
        return self._generator.count(request)

    def complete(self, request: CompleteRequest, cancelled: Cancelled) -> Generation:
        """See Completes.complete."""
        assert self._generator is not None
        return (yield from self._generator.complete(request, cancelled))

    def close(self) -> None:
        """See Backend.close."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None
            del self._session
        self._generator = None


def _config(artifact: Artifact, name: str) -> str:
    """Return the path of a configuration file. Raises BackendError if the model has none."""
    for path in artifact.paths("config"):
        if PurePath(path).name == name:
            return path
    raise BackendError("load_failed", f"the model has no {name}: import its whole folder anew")


def _check(cancelled: Cancelled) -> None:
    if cancelled():
        raise BackendError("cancelled", "the request was cancelled")
