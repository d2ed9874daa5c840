"""Bounded readers of model file headers. Model files are untrusted input."""

from __future__ import annotations

from daemon.errors import InvalidRequest


class InvalidModelFile(InvalidRequest):
    """A model file that is damaged, incomplete or not of a kind that is read here.

    The message begins with the file's name and says what is wrong with it.
    """

    code = "invalid_model_file"
