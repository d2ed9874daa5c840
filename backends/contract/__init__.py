"""The contract between modeld and an inference engine.

Owns the Backend protocol, the values that cross it and its errors. Knows no engine, no channel
and no HTTP. Stdlib only: the daemon, the workers and third-party backends all import it.

A request is shaped like OpenAI's; the other APIs translate at the edge.
"""

from __future__ import annotations

from backends.contract.answers import (
    Answer,
    Classes,
    Count,
    Delta,
    Done,
    Embeddings,
    Scores,
    Timings,
    TokenLogprob,
    ToolCall,
    Usage,
)
from backends.contract.backend import (
    Backend,
    Cancelled,
    Chats,
    Classifies,
    Completes,
    Counts,
    Embeds,
    Generation,
    Progress,
    Reranks,
    Resumes,
)
from backends.contract.errors import (
    BackendError,
)
from backends.contract.machine import (
    Gpu,
    Hardware,
    Probe,
)
from backends.contract.model import (
    Artifact,
    Fit,
    LoadedModel,
    LoadOptions,
    LoadSpec,
    MemoryEstimate,
    ModelFile,
    Placement,
    SavedConversation,
    Task,
    Upstream,
)
from backends.contract.options import (
    Option,
    check_options,
)
from backends.contract.requests import (
    REASONING_EFFORTS,
    ChatRequest,
    ClassifyRequest,
    CompleteRequest,
    CountRequest,
    EmbedRequest,
    Request,
    RerankRequest,
    Sampling,
    needed_task,
)

__all__ = [
    "REASONING_EFFORTS",
    "Answer",
    "Artifact",
    "Backend",
    "BackendError",
    "Cancelled",
    "ChatRequest",
    "Chats",
    "Classes",
    "Classifies",
    "ClassifyRequest",
    "CompleteRequest",
    "Completes",
    "Count",
    "CountRequest",
    "Counts",
    "Delta",
    "Done",
    "EmbedRequest",
    "Embeddings",
    "Embeds",
    "Fit",
    "Generation",
    "Gpu",
    "Hardware",
    "LoadOptions",
    "LoadSpec",
    "LoadedModel",
    "MemoryEstimate",
    "ModelFile",
    "Option",
    "Placement",
    "Probe",
    "Progress",
    "Request",
    "RerankRequest",
    "Reranks",
    "Resumes",
    "Sampling",
    "SavedConversation",
    "Scores",
    "Task",
    "Timings",
    "TokenLogprob",
    "ToolCall",
    "Upstream",
    "Usage",
    "check_options",
    "needed_task",
]
