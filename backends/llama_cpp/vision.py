"""Images for a language model, through llama.cpp's multimodal library and an mmproj file.

Text and images become chunks on the request's thread; `evaluate` puts an image into the KV cache
and belongs to the thread that owns the context.
"""

from __future__ import annotations

import ctypes
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from backends.contract import BackendError
from backends.llama_cpp import log
from backends.llama_cpp.slots import Image, Prompt


class Vision:
    """The image encoder in the file at `path`, for the language model `model`.

    Raises BackendError("load_failed"). `free` it before the model.
    """

    def __init__(self, path: str, model: Any, *, threads: int) -> None:
        try:
            from llama_cpp import mtmd_cpp
        except Exception as error:
            raise BackendError(
                "load_failed",
                f"this build of llama-cpp-python has no library for images ({error}): load the "
                "model without its mmproj file, or install a build that has it",
            ) from error
        self._engine = mtmd_cpp
        log.warnings_of(mtmd_cpp.mtmd_helper_log_set)
        # A text that has the usual marker in it must not be taken for an image.
        self.marker = f"<__image_{secrets.token_hex(8)}__>"
        self._marker_bytes = self.marker.encode()
        params = mtmd_cpp.mtmd_context_params_default()
        params.use_gpu = False  # it is booked as RAM
        params.n_threads = threads
        params.print_timings = False
        params.media_marker = self._marker_bytes
        with log.overheard() as errors:
            self._context = mtmd_cpp.mtmd_init_from_file(path.encode(), model, params)
        if not self._context:
            said = errors[0] if errors else "the engine gave no reason"
            raise BackendError("load_failed", f"the image encoder {path} cannot be used: {said}")
        if not mtmd_cpp.mtmd_support_vision(self._context):
            self.free()
            raise BackendError("load_failed", f"{path} is no encoder of images")

    @property
    def attends_to_whole_images(self) -> bool:
        """Whether one batch must hold a whole image, whose tokens look at each other both ways."""
        return bool(self._engine.mtmd_decode_use_non_causal(self._context, None))

    @contextmanager
    def prompt(self, text: str, images: Sequence[bytes], *, add_special: bool) -> Iterator[Prompt]:
        """Yield the prompt for `text`, which has a marker for each of `images`.

        Raises BackendError("invalid_request") for what is not an image.
        """
        bitmaps: list[Any] = []
        chunks = self._engine.mtmd_input_chunks_init()
        try:
            bitmaps += (self._bitmap(number, image) for number, image in enumerate(images, start=1))
            raw = text.encode("utf-8", "replace")
            asked = self._engine.mtmd_input_text(raw, len(raw), add_special, True)
            array = (ctypes.c_void_p * len(bitmaps))(*bitmaps)
            status = self._engine.mtmd_tokenize(
                self._context, chunks, ctypes.byref(asked), array, len(bitmaps)
            )
            if status:
                raise BackendError(
                    "invalid_request", f"the engine can't take these images (status {status})"
                )
            yield self._assemble(chunks)
        finally:
            self._engine.mtmd_input_chunks_free(chunks)
            for bitmap in bitmaps:
                self._engine.mtmd_bitmap_free(bitmap)

    def _bitmap(self, number: int, image: bytes) -> Any:
        buffer = (ctypes.c_uint8 * len(image)).from_buffer_copy(image)
        bitmap = self._engine.mtmd_helper_bitmap_init_from_buf(
            self._context, buffer, len(image), False
        )
        if not bitmap:
            raise BackendError("invalid_request", f"image {number} is broken: it can't be decoded")
        return bitmap

    def _assemble(self, chunks: Any) -> Prompt:
        engine = self._engine
        parts: list[list[int] | Image] = []
        for at in range(engine.mtmd_input_chunks_size(chunks)):
            chunk = engine.mtmd_input_chunks_get(chunks, at)
            if engine.mtmd_input_chunk_get_type(chunk) == engine.MTMD_INPUT_CHUNK_TYPE_TEXT:
                count = ctypes.c_size_t()
                tokens = engine.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
                parts.append(tokens[: count.value])
            else:
                parts.append(
                    Image(
                        chunk=chunk,
                        tokens=engine.mtmd_input_chunk_get_n_tokens(chunk),
                        positions=engine.mtmd_input_chunk_get_n_pos(chunk),
                    )
                )
        if not parts or isinstance(parts[-1], Image):
            raise BackendError("invalid_request", "there must be text after the last image")
        return Prompt(tuple(parts))

    def evaluate(
        self, context: Any, image: Image, *, position: int, sequence: int, batch: int
    ) -> int:
        """Encode `image` and put it into the sequence; return the engine's status, 0 for success.

        Takes seconds on a CPU.
        """
        after = ctypes.c_int32(position)
        status: int = self._engine.mtmd_helper_eval_chunk_single(
            self._context,
            context,
            image.chunk,
            position,
            sequence,
            batch,
            False,
            ctypes.byref(after),
        )
        return status

    def free(self) -> None:
        """Give the engine's memory back. May be called twice."""
        if self._context:
            self._engine.mtmd_free(self._context)
            self._context = None
