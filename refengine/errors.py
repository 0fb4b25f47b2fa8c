"""Errors that are the user's to mend: the command line prints them as one line."""

from __future__ import annotations


class RefengineError(Exception):
    """Something the user can put right; its message says what came, what was wanted, what to do."""


class ModelLoadError(RefengineError, ValueError):
    """A model's files are missing, damaged or of a kind that this engine does not run."""


class RequestError(RefengineError, ValueError):
    """A request that cannot be served as it was asked."""


class QueueFullError(RequestError):
    """As many requests wait as may; the same request can be served later."""
