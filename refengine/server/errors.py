"""Errors as OpenAI's API writes them (Ollama's routes write theirs), with the right status."""

from __future__ import annotations

import json
from typing import Any

import flask
from pydantic import ValidationError
from werkzeug.exceptions import HTTPException

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """A request that gets an error.

    Args:
        status: of HTTP.
        message: what came, what was wanted, what to do.
        param: the field at fault.
        code: a word for programs.
        headers: to send along.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """As OpenAI's API writes it."""
        kind = TYPES.get(self.status)
        if kind is None:
            kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }


def invalid(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    """A 400 that names a field."""
    return ApiError(400, message, param=param, code=code)


def error_response(error: ApiError) -> flask.Response:
    """The response for an error, in the shape that the route's clients read."""
    body: dict[str, Any] = error.body()
    if flask.request.path.startswith("/api/"):
        body = {"error": error.message}
    response = flask.Response(
        json.dumps(body), status=error.status, mimetype="application/json", headers=error.headers
    )
    return response


def from_http_exception(error: HTTPException) -> ApiError:
    """Flask's own errors: no such route, wrong method, a body that is too large."""
    status = error.code or 500
    request = flask.request
    message = error.description or error.name
    headers: dict[str, str] = {}
    code = None
    if status == 404:
        message, code = (
            f"there is no {request.path} here; /openapi.json lists the routes",
            "not_found",
        )
    elif status == 405:
        allowed = ", ".join(sorted(set(error.valid_methods or ()) - {"HEAD", "OPTIONS"}))  # type: ignore[attr-defined]
        message = f"{request.path} takes {allowed}, not {request.method}"
        code = "method_not_allowed"
        headers["Allow"] = allowed
    elif status == 413:
        limit = flask.current_app.config["MAX_CONTENT_LENGTH"]
        message = f"the request body is larger than {limit:,} bytes (--max-body-bytes)"
        code = "request_too_large"
    return ApiError(status, message, code=code, headers=headers)


def from_validation_error(error: ValidationError, unsupported: dict[str, str]) -> ApiError:
    """The first fault that pydantic found, with the field's name and what would be right."""
    faults = error.errors(include_url=False, include_context=False)
    first = faults[0]
    # A union reports one fault a member; the deepest is nearest to what was meant.
    param = _path(first["loc"])
    name = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        why = unsupported.get(name) if len(first["loc"]) == 1 else None
        message = f"{param} is not a field of this request; leave it out"
        if why is not None:
            message = f"{param} is not supported by this server: {why}; leave it out"
        return ApiError(400, message, param=param, code="unsupported_parameter")
    if first["type"] == "missing":
        return invalid(param, f"{param} is missing; it is required", "missing_required_parameter")
    same = [fault for fault in faults if fault["loc"][:1] == first["loc"][:1]]
    reasons = list(dict.fromkeys(_sentence(fault["msg"]) for fault in same))[:4]
    came = _shown(first.get("input"))
    message = f"{param or 'the request'}: {' or '.join(reasons)}; got {came}"
    return ApiError(400, message, param=param or None, code="invalid_value")


def _sentence(text: str) -> str:
    text = text.removeprefix("Value error, ")
    return text[:1].lower() + text[1:]


def _shown(value: object) -> str:
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 100 else text[:100] + "..."


def _path(location: tuple[int | str, ...]) -> str:
    """A field's name as a client writes it: ``messages[0].role``; names of types are left out."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "int", "float", "bool"):
            text += f".{part}" if text else part
    return text
