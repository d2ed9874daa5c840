"""A backend that recites what a model file says of itself, word by word."""

from itertools import cycle, islice
from pathlib import Path
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
from backends.room import check_room
from backends.text import StopScanner


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
        if not Path(spec.artifact.path).read_bytes().startswith(b"GGUF"):
            raise BackendError("load_failed", f"{spec.artifact.path} is not a GGUF file")
        times = check_options(self.name, self.options, spec.engine).get("repeat", 1)
        self.words = spec.artifact.metadata["general.description"].split() * times
        self.context_length = spec.context_length
        return LoadedModel(
            tasks=(Task.CHAT,),
            slots=spec.slots,
            context_length=spec.context_length,
            engine_version="1.0",
        )

    def chat(self, request, cancelled):
        asked = sum(len(str(message["content"]).split()) for message in request.messages)
        check_room(asked, request.sampling, self.context_length)
        room = self.context_length - asked
        sampling, count = request.sampling, 0
        words = cycle(self.words) if sampling.ignore_eos else self.words
        scanner = StopScanner(sampling.stop)
        for word in islice(words, min(room, sampling.max_tokens or room)):
            if cancelled():
                return Done(finish_reason="cancelled")
            count += 1
            if text := scanner.feed((word if count == 1 else f" {word}").encode()):
                yield Delta(content=text)
            if scanner.stopped:
                break
        if text := scanner.flush():
            yield Delta(content=text)
        whole = scanner.stopped or (not sampling.ignore_eos and count == len(self.words))
        usage = Usage(prompt_tokens=asked, completion_tokens=count)
        return Done(
            finish_reason="stop" if whole else "length",
            usage=usage,
            stopped_by=scanner.stopped_by,
        )

    def close(self):
        self.words = []
