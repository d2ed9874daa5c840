"""Models that run elsewhere, behind an OpenAI-compatible API.

`backend` is the Backend, `bodies` and `answers` translate both ways, `client` is the HTTP, and
`lister` the main of the child that asks an upstream which models it has; `messages` are its.
"""

from __future__ import annotations

from backends.remote.backend import Remote

__all__ = ["Remote"]
