"""The Flask application: its routes, and what happens before and after each of them."""

from __future__ import annotations

import hmac
import logging
import re
import time
import uuid
from urllib.parse import urlsplit

import flask
from werkzeug.exceptions import HTTPException

from refengine.server import chat, completions, embeddings, general, ollama
from refengine.server.context import Context
from refengine.server.errors import ApiError, error_response, from_http_exception
from refengine.server.metrics import make_registry

log = logging.getLogger("refengine.server.access")

# What a client may send as X-Request-Id; anything else could forge a line of the log.
REQUEST_ID = re.compile(r"^[A-Za-z0-9._:-]{1,128}$")


def create_app(context: Context) -> flask.Flask:
    """An application around an engine's client."""
    app = flask.Flask("refengine.server", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = context.config.max_body_bytes
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.extensions["refengine"] = context
    app.extensions["refengine_metrics"] = make_registry(context)
    for module in (general, chat, completions, embeddings, ollama):
        app.register_blueprint(module.blueprint)
    app.before_request(_begin)
    app.after_request(_finish)
    app.register_error_handler(ApiError, error_response)
    app.register_error_handler(HTTPException, _http_error)
    app.register_error_handler(Exception, _unexpected)
    return app


def _begin() -> flask.Response | None:
    """Name the request, let it in or not."""
    request, config = flask.request, flask.current_app.extensions["refengine"].config
    given = request.headers.get("X-Request-Id", "")
    flask.g.request_id = given if REQUEST_ID.match(given) else uuid.uuid4().hex
    flask.g.started = time.perf_counter()
    origin = request.headers.get("Origin")
    if origin is not None and not _same_site(origin) and not _allowed(origin, config.cors_origins):
        # Any page that a browser shows could otherwise use a server on the reader's machine.
        raise ApiError(
            403,
            f"requests from pages of {origin[:200]} are not allowed (--cors-origin)",
            code="origin_not_allowed",
        )
    if request.method == "OPTIONS" and origin is not None:
        return flask.Response(status=204)
    if config.api_key is not None and request.path != "/health":
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        right = hmac.compare_digest(
            key.strip().encode("latin-1", "replace"), config.api_key.encode()
        )
        if scheme.lower() != "bearer" or not right:
            raise ApiError(
                401,
                "send the server's API key as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
    return None


def _finish(response: flask.Response) -> flask.Response:
    """Headers that every response has, and a line in the log."""
    request, config = flask.request, flask.current_app.extensions["refengine"].config
    request_id = flask.g.get("request_id", "")
    response.headers["X-Request-Id"] = request_id
    response.headers["X-Content-Type-Options"] = "nosniff"
    origin = request.headers.get("Origin")
    if origin is not None and _allowed(origin, config.cors_origins):
        response.headers["Access-Control-Allow-Origin"] = origin
        response.headers["Access-Control-Allow-Headers"] = (
            "Authorization, Content-Type, X-Request-Id"
        )
        response.headers["Access-Control-Allow-Methods"] = "GET, POST"
        response.headers["Access-Control-Expose-Headers"] = "X-Request-Id"
        response.headers.add("Vary", "Origin")
    started = flask.g.get("started", time.perf_counter())
    method, path, status = request.method, request.path, response.status_code

    def write_line() -> None:
        seconds = time.perf_counter() - started
        fields = {"request_id": request_id, "method": method, "path": path, "status": status,
                  "seconds": round(seconds, 4)}  # fmt: skip
        log.info("request", extra={"fields": fields})

    # Of a stream, the time to its end counts.
    if response.is_streamed:
        response.call_on_close(write_line)
    else:
        write_line()
    return response


def _same_site(origin: str) -> bool:
    """Whether a page comes from this very server."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    return parts.scheme == flask.request.scheme and parts.netloc == flask.request.host


def _allowed(origin: str, origins: tuple[str, ...]) -> bool:
    return "*" in origins or origin in origins


def _http_error(error: HTTPException) -> flask.Response:
    return error_response(from_http_exception(error))


def _unexpected(error: Exception) -> flask.Response:
    """A fault of this server's own: told without its details, which are in the log."""
    log.error(
        "unexpected error",
        exc_info=error,
        extra={"fields": {"request_id": flask.g.get("request_id", "")}},
    )
    return error_response(
        ApiError(500, "the server failed; its log says more", code="internal_error")
    )
