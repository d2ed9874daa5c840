"""Text generation through onnxruntime-genai, one request at a time.

Owns the engine's model, the search and the loop over tokens. Prompts are read in pieces, between
which a request can be cancelled. Tokens are made and read by `texts`; the engine's own tokenizer
renders chat templates, in C++, where a template can reach nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from backends import roles, thinking
from backends.contract import (
    BackendError,
    Cancelled,
    ChatRequest,
    CompleteRequest,
    Count,
    CountRequest,
    Delta,
    Done,
    Generation,
    LoadSpec,
    Sampling,
    Timings,
    Usage,
)
from backends.onnx import settings
from backends.onnx.session import return_unused_memory
from backends.onnx.texts import Texts
from backends.text import StopScanner

_CONFIG = "genai_config.json"
_MIN_PIECE_TOKENS = 8
_GPU_PIECE_TOKENS = 512


class Generator:
    """A model in onnxruntime-genai. Not thread-safe."""

    def __init__(self, spec: LoadSpec, context_length: int, texts: Texts) -> None:
        """Load the model. Raises BackendError("load_failed", …)."""
        try:
            import onnxruntime_genai as genai
        except Exception as error:
            raise BackendError(
                "load_failed",
                f"onnxruntime-genai cannot be imported ({error}); install it with: "
                f"{settings.INSTALL_GENAI}",
            ) from error
        self._texts = texts
        self._context_length = context_length
        self._template = thinking.switchable(spec.artifact.chat_template)
        self._vocabulary = settings.fact(spec.artifact, "vocabulary")
        self._ends = frozenset(spec.artifact.metadata.get("onnx.eos_token_ids", ()))
        self._piece = max(_MIN_PIECE_TOKENS, settings.batch_tokens(spec.artifact, spec.threads))
        folder = _folder(spec)
        try:
            config = genai.Config(folder)
            config.clear_providers()
            if spec.placement.gpu_layers and genai.is_cuda_available():
                config.append_provider("cuda")
                self._piece = _GPU_PIECE_TOKENS
            config.overlay(json.dumps({"model": {"decoder": {"session_options": _session(spec)}}}))
            self._model = genai.Model(config)
            self._tokenizer = genai.Tokenizer(self._model)
            self._try_out()
        except Exception as error:
            raise BackendError(
                "load_failed", f"onnxruntime-genai cannot load {folder}: {error}"
            ) from error
        return_unused_memory()

    def _try_out(self) -> None:
        """Generate a token: only then does the engine see whether graph and configuration fit."""
        generator = self._prepared(Sampling(), 2)
        self._read(generator, [0], lambda: False)
        self._next(generator)

    def chat(self, request: ChatRequest, cancelled: Cancelled) -> Generation:
        """See Chats.chat."""
        prompt = self._texts.prompt(self._rendered(request), request.sampling, special=False)
        return (yield from self._generate(prompt, request.sampling, cancelled))

    def count(self, request: CountRequest) -> Count:
        """See Counts.count."""
        return Count(tokens=len(self._texts.ids(self._rendered(request.chat), special=False)))

    def _rendered(self, request: ChatRequest) -> str:
        if request.tools and request.tool_choice != "none":
            raise BackendError(
                "invalid_request",
                "the onnx backend cannot call tools: leave `tools` out, or use a GGUF model",
            )
        messages = [{**message, "content": _plain(message)} for message in request.messages]
        template = thinking.settings(request) + self._template

        def render(messages: list[dict[str, Any]]) -> str:
            told = json.dumps(messages)
            return str(
                self._tokenizer.apply_chat_template(
                    messages=told, template_str=template, add_generation_prompt=True
                )
            )

        return roles.rendered(render, messages)

    def complete(self, request: CompleteRequest, cancelled: Cancelled) -> Generation:
        """See Completes.complete."""
        if request.suffix is not None:
            raise BackendError("invalid_request", "the onnx backend cannot fill in before a suffix")
        prompt = self._texts.prompt(request.prompt, request.sampling, special=True)
        return (yield from self._generate(prompt, request.sampling, cancelled))

    def _generate(self, prompt: list[int], sampling: Sampling, cancelled: Cancelled) -> Generation:
        room = self._context_length - len(prompt)
        most = room if sampling.max_tokens is None else min(room, sampling.max_tokens)
        started = time.monotonic()
        generator = self._prepared(sampling, len(prompt) + most)
        if not self._read(generator, prompt, cancelled):
            return Done(finish_reason="cancelled", usage=Usage(prompt_tokens=len(prompt)))
        read = time.monotonic()
        scanner, decode = StopScanner(sampling.stop), self._texts.decoder()
        finish_reason, count = "length", 0
        while count < most:
            if cancelled():
                finish_reason = "cancelled"
                break
            token = self._next(generator)
            if token in self._ends and not sampling.ignore_eos:
                finish_reason = "stop"
                break
            count += 1
            if text := scanner.feed(decode(token).encode()):
                yield Delta(content=text)
            if scanner.stopped:
                finish_reason = "stop"
                break
        if text := scanner.flush():
            yield Delta(content=text)
        return Done(
            finish_reason=finish_reason,
            usage=Usage(prompt_tokens=len(prompt), completion_tokens=count),
            timings=Timings(
                prompt_ms=(read - started) * 1e3, predicted_ms=(time.monotonic() - read) * 1e3
            ),
            stopped_by=scanner.stopped_by,
        )

    def _prepared(self, sampling: Sampling, max_length: int) -> Any:
        import onnxruntime_genai as genai

        search = search_options(sampling, max_length)
        if self._vocabulary and "top_k" in search:  # more than there are is an error to the engine
            search["top_k"] = min(search["top_k"], self._vocabulary)
        try:
            parameters = genai.GeneratorParams(self._model)
            parameters.set_search_options(**search)
            return genai.Generator(self._model, parameters)
        except Exception as error:
            raise BackendError("engine_error", f"onnxruntime-genai: {error}") from error

    def _read(self, generator: Any, prompt: list[int], cancelled: Cancelled) -> bool:
        """Bring the prompt into the KV cache; say whether that was not cancelled."""
        import numpy as np

        for start in range(0, len(prompt), self._piece):
            if cancelled():
                return False
            try:
                generator.append_tokens(np.array(prompt[start : start + self._piece], np.int32))
            except Exception as error:
                raise BackendError("engine_error", f"onnxruntime-genai: {error}") from error
        return True

    def _next(self, generator: Any) -> int:
        try:
            generator.generate_next_token()
            return int(generator.get_next_tokens()[0])
        except Exception as error:
            raise BackendError("engine_error", f"onnxruntime-genai: {error}") from error


def search_options(sampling: Sampling, max_length: int) -> dict[str, Any]:
    """Return the engine's search options. Raises BackendError for what it cannot do. Pure."""
    impossible = {
        "min_p": sampling.min_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "logit_bias": sampling.logit_bias,
        "json_schema": sampling.json_schema is not None,
        "grammar": sampling.grammar,
        "logprobs": sampling.logprobs is not None,
    }
    if asked := [name for name, value in impossible.items() if value]:
        raise BackendError(
            "invalid_request", f"the onnx backend does not know {', '.join(asked)}: leave it out"
        )
    options: dict[str, Any] = {
        "max_length": max_length,
        "batch_size": 1,
        "num_beams": 1,
        "num_return_sequences": 1,
    }
    if sampling.temperature is not None:
        options["do_sample"] = sampling.temperature > 0
        if sampling.temperature > 0:
            options["temperature"] = sampling.temperature
    given: Mapping[str, Any] = {
        "top_p": sampling.top_p,
        "top_k": None if sampling.top_k is None else max(0, sampling.top_k),
        "random_seed": None if sampling.seed is None else sampling.seed & 0x7FFF_FFFF,
        "repetition_penalty": sampling.repeat_penalty,
        "min_length": max_length if sampling.ignore_eos else None,
    }
    return options | {name: value for name, value in given.items() if value is not None}


def _folder(spec: LoadSpec) -> str:
    for path in spec.artifact.paths("config"):
        if PurePath(path).name == _CONFIG:
            return str(PurePath(path).parent)
    raise BackendError("load_failed", f"the model has no {_CONFIG}: import its whole folder anew")


def _session(spec: LoadSpec) -> dict[str, Any]:
    """Return the session options that hold for every model, whatever its configuration says."""
    return {
        "intra_op_num_threads": spec.threads,
        "inter_op_num_threads": 1,
        "log_severity_level": 3,
        "session.intra_op.allow_spinning": "0",
    }


def _plain(message: Mapping[str, Any]) -> str:
    """Return the text of a message. Raises BackendError for one with anything else in it."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    if any(part.get("type") != "text" for part in content):
        raise BackendError("invalid_request", "this model reads text only: it cannot see images")
    return "".join(part["text"] for part in content)
