"""A backend that recites what a model file says of itself, word by word."""

from typing import ClassVar

from backends.contract import (
    BackendError,
    Delta,
    Done,
    Fit,
    LoadedModel,
    MemoryEstimate,
    Option,
    Probe,
    Task,
    Usage,
    check_options,
)


class Recital:
    """One instance holds one loaded model, in a process of its own."""

    name: ClassVar = "recital"
    formats: ClassVar = frozenset({"gguf"})
    distribution: ClassVar = "modeld-recital"
    options: ClassVar = {"repeat": Option(kind="integer", minimum=1, maximum=9, help="how often")}

    @classmethod
    def probe(cls):
        # Import the engine here, in load and later, never at the top of the module.
        return Probe(backend=cls.name, available=True, version="1.0", devices=("CPU",))

    @classmethod
    def fit(cls, artifact, probe, hardware):
        if "general.description" not in artifact.metadata:
            return Fit(score=0, reason="the file does not say anything of itself")
        return Fit(score=5, reason="has a text to recite", tasks=(Task.CHAT,))

    @classmethod
    def estimate(cls, artifact, options):
        check_options(cls.name, cls.options, options.engine)
        return MemoryEstimate(
            context_length=options.context_length or 1024,
            slots=options.slots or 4,
            parts={"weights": 0, "runtime": 20_000_000},
        )

    def load(self, spec, progress):
        text = spec.artifact.metadata["general.description"]
        self.words = text.split() * check_options(self.name, self.options, spec.engine).get(
            "repeat", 1
        )
        self.context_length = spec.context_length
        return LoadedModel(
            tasks=(Task.CHAT,),
            slots=spec.slots,
            context_length=spec.context_length,
            engine_version="1.0",
        )

    def chat(self, request, cancelled):
        asked = sum(len(message["content"].split()) for message in request.messages)
        if asked >= self.context_length:
            text = f"{asked} words asked, but context_length is {self.context_length}"
            raise BackendError("context_length_exceeded", text)
        words = self.words[: request.sampling.max_tokens]
        for count, word in enumerate(words):
            if cancelled():
                return Done(finish_reason="cancelled")
            yield Delta(content=word if count == 0 else f" {word}")
        whole = len(words) == len(self.words)
        usage = Usage(prompt_tokens=asked, completion_tokens=len(words))
        return Done(finish_reason="stop" if whole else "length", usage=usage)

    def close(self):
        self.words = []
