"""One graph in onnxruntime: how it is opened, fed and read.

Owns the engine's settings and the names of a graph's inputs. Knows no task.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from typing import Any

from backends.contract import BackendError
from backends.onnx.texts import Text

_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
_INTEGERS = {"tensor(int64)": "int64", "tensor(int32)": "int32"}
# onnxruntime's severities: its warnings are about what it did to a graph, of no use to users.
_ERRORS = 3


class Session:
    """A graph that turns tokens into rows. Thread-safe."""

    def __init__(
        self,
        path: str,
        *,
        providers: Sequence[str],
        threads: int,
        output: str,
        padding_id: int,
        fixed_length: int,
    ) -> None:
        """Open the graph at `path`. Raises BackendError("load_failed", …).

        `output` names the output to read. Texts are filled up to `fixed_length` tokens, if it is
        not 0, else to the longest of a batch.
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _ERRORS
        # A service that waits must not burn the CPU. A text of 16 tokens then takes 5 ms
        # instead of 3 on an idle machine, but half as long on a busy one.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # It plans a block for every new shape of a batch, which costs memory and gains no time.
        options.enable_mem_pattern = False
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=list(providers))
        except Exception as error:
            raise BackendError("load_failed", f"onnxruntime cannot load {path}: {error}") from error
        self._output = output
        self._padding_id = padding_id
        self._fixed_length = fixed_length
        self._types = self._input_types(path)
        if output not in [port.name for port in self._session.get_outputs()]:
            raise BackendError("load_failed", f"{path} has no output {output!r}")
        return_unused_memory()

    def new_run(self) -> Any:
        """Return what a run is ended with: see `batches.Run`."""
        import onnxruntime

        options = onnxruntime.RunOptions()
        options.log_severity_level = 4  # one that was ended is no error
        return options

    def run(self, texts: Sequence[Text], options: Any) -> tuple[Any, Any]:
        """Return the output for `texts` as float32, and which tokens of it are no padding."""
        import numpy as np

        length = self._fixed_length or max(len(text.ids) for text in texts)
        ids = np.full((len(texts), length), self._padding_id, dtype=np.int64)
        types = np.zeros_like(ids)
        mask = np.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, : len(text.ids)] = text.ids
            types[row, : len(text.types)] = text.types
            mask[row, : len(text.ids)] = 1
        values = {
            "input_ids": ids,
            "attention_mask": mask,
            "token_type_ids": types,
            "position_ids": np.maximum(mask.cumsum(axis=1) - 1, 0),
        }
        feed = {name: values[name].astype(kind, copy=False) for name, kind in self._types.items()}
        (output,) = self._session.run([self._output], feed, options)
        output = np.asarray(output, dtype=np.float32)
        if not np.isfinite(output[mask > 0] if output.ndim == 3 else output).all():
            raise BackendError("engine_error", "the model computed numbers that are not finite")
        return output, mask

    def _input_types(self, path: str) -> dict[str, str]:
        found = {}
        for port in self._session.get_inputs():
            if port.name not in _INPUTS or port.type not in _INTEGERS:
                raise BackendError(
                    "load_failed",
                    f"{path} needs the input {port.name} ({port.type}), which is not known here: "
                    f"export the model with {', '.join(_INPUTS)} only",
                )
            found[port.name] = _INTEGERS[port.type]
        return found


def return_unused_memory() -> None:
    """Give back what the allocator keeps of a load: as much as the weights again was seen."""
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "malloc_trim"):  # glibc alone has it
            library.malloc_trim(0)
