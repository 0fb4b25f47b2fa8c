"""Reading a request's body: JSON as RFC 8259 has it, whatever a client sends."""

from __future__ import annotations

import json
from typing import Any, TypeVar

import flask
from pydantic import BaseModel, ValidationError
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from refengine.server.errors import ApiError, from_validation_error

# Nesting beyond this is no request but an attack on whoever walks it.
MAX_DEPTH = 64

Model = TypeVar("Model", bound=BaseModel)


def read_body(model: type[Model], *, any_type: bool = False) -> Model:
    """The request's body as one of the schemas.

    Args:
        model: the schema; an ``unsupported`` attribute says why known fields are refused.
        any_type: take any content type (Ollama's documented curl commands send none).

    Raises:
        ApiError: 400 with the field's name, 413, or 415.
    """
    value = read_json(any_type=any_type)
    unsupported: dict[str, str] = getattr(model, "unsupported", {})
    # A null asks for nothing.
    value = {k: v for k, v in value.items() if not (v is None and k in unsupported)}
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise from_validation_error(error, unsupported) from None


def read_json(*, any_type: bool = False) -> dict[str, Any]:
    """The request's body as a JSON object."""
    request = flask.request
    if not any_type and not request.is_json:
        raise ApiError(
            415,
            f"the content type must be application/json, got {request.content_type or 'none'}",
            code="unsupported_media_type",
        )
    try:
        raw = request.get_data(cache=False)
    except HTTPException:
        raise
    except (OSError, ValueError) as error:
        raise ApiError(400, f"the body could not be read: {error}", code="bad_body") from None
    limit = flask.current_app.config["MAX_CONTENT_LENGTH"]
    if request.content_length is None and len(raw) >= limit:
        raise RequestEntityTooLarge  # a chunked body is cut off there, without an error
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ApiError(
            400,
            f"the body is not UTF-8: byte {raw[error.start]:#04x} at position {error.start}",
            code="invalid_json",
        ) from None
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise ApiError(
            400, f"the body nests deeper than {MAX_DEPTH} levels", code="invalid_json"
        ) from None
    except ValueError as error:  # not JSON, or a number of thousands of digits
        message = str(error)[:200]
        raise ApiError(400, f"the body is not JSON: {message}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    _check_depth(value)
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ApiError(
            400,
            "the body holds half a surrogate pair, which is no character",
            code="invalid_json",
        ) from None
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _check_depth(value: Any) -> None:
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return
    raise ApiError(400, f"the body nests deeper than {MAX_DEPTH} levels", code="invalid_json")
