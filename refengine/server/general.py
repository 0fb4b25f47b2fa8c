"""The smaller routes: models, tokens, health, metrics, documents and the page."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import flask
import prometheus_client

from refengine._version import __version__
from refengine.server.chat import plain_message, render
from refengine.server.context import current
from refengine.server.errors import invalid
from refengine.server.json_body import read_body
from refengine.server.openapi import document
from refengine.server.schemas import DetokenizeRequest, TokenizeRequest

blueprint = flask.Blueprint("general", __name__)

# The pages bring all they need, and nothing from elsewhere is let in.
PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"  # noqa: E501


@blueprint.get("/v1/models")
def models() -> flask.Response:
    """The models that are served."""
    return flask.jsonify({"object": "list", "data": [_model()]})


@blueprint.get("/v1/models/<path:name>")
def model(name: str) -> flask.Response:
    """One of them."""
    current().check_model(name)
    return flask.jsonify(_model())


@blueprint.post("/tokenize")
def tokenize() -> flask.Response:
    """Text or a conversation to token ids."""
    context = current()
    request = read_body(TokenizeRequest)
    if request.model is not None:
        context.check_model(request.model)
    if (request.prompt is None) == (request.messages is None):
        raise invalid("prompt", "send either prompt or messages")
    if request.messages is not None:
        messages = [plain_message(message) for message in request.messages]
        tokens = list(
            render(context, messages, [], add_generation_prompt=request.add_generation_prompt)
        )
    else:
        tokens = context.tokenizer.encode(request.prompt or "", request.add_special_tokens)
    info = context.client.info
    return flask.jsonify(
        {
            "tokens": tokens,
            "count": len(tokens),
            "max_model_len": None if info is None else info.max_model_len,
        }
    )


@blueprint.post("/detokenize")
def detokenize() -> flask.Response:
    """Token ids to text."""
    context = current()
    request = read_body(DetokenizeRequest)
    if request.model is not None:
        context.check_model(request.model)
    vocab_size = context.structures.vocab_size
    wrong = next((token for token in request.tokens if token >= vocab_size), None)
    if wrong is not None:
        raise invalid("tokens", f"tokens holds {wrong}; this model has 0 to {vocab_size - 1}")
    text = context.tokenizer.decode(request.tokens, request.skip_special_tokens)
    return flask.jsonify({"prompt": text})


@blueprint.get("/health")
def health() -> tuple[flask.Response, int]:
    """200 while requests are served; 503 before, after, and when the engine is dead."""
    context = current()
    state = "draining" if context.draining else context.client.state
    body: dict[str, Any] = {"status": state}
    if state == "dead":
        body["reason"] = context.client.reason
    return flask.jsonify(body), 200 if state == "ready" else 503


@blueprint.get("/version")
def version() -> flask.Response:
    """This server's version."""
    return flask.jsonify({"version": __version__})


@blueprint.get("/metrics")
def metrics() -> flask.Response:
    """Prometheus' text format."""
    registry = flask.current_app.extensions["refengine_metrics"]
    data = prometheus_client.generate_latest(registry)
    return flask.Response(data, content_type="text/plain; version=0.0.4; charset=utf-8")


@blueprint.get("/openapi.json")
def openapi() -> flask.Response:
    """The routes, for programs."""
    return flask.jsonify(document())


@blueprint.get("/docs")
def docs() -> flask.Response:
    """The routes, for people."""
    return _page("docs.html")


@blueprint.get("/")
def index() -> flask.Response:
    """A page with a chat box."""
    return _page("index.html")


def _page(name: str) -> flask.Response:
    text = files("refengine.server").joinpath("static", name).read_text(encoding="utf-8")
    return flask.Response(
        text, mimetype="text/html", headers={"Content-Security-Policy": PAGE_POLICY}
    )


def _model() -> dict[str, Any]:
    context = current()
    info = context.client.info
    described: dict[str, Any] = {
        "id": context.model_name,
        "object": "model",
        "created": context.created,
        "owned_by": "refengine",
    }
    if info is not None:
        described |= {
            "max_model_len": info.max_model_len,
            "backend": info.backend,
            "dtype": info.dtype,
            "num_kv_blocks": info.num_kv_blocks,
            "block_size": info.block_size,
        }
    return described
