"""``POST /v1/embeddings``: pooled hidden states of the model, of unit length."""

from __future__ import annotations

import base64
import math
import struct
from typing import Any

import flask

from refengine.server.completions import read_prompts
from refengine.server.context import current
from refengine.server.errors import ApiError
from refengine.server.generation import Choice, Generation, fan_out
from refengine.server.json_body import read_body
from refengine.server.sampling import make_params
from refengine.server.schemas import EmbeddingRequest

blueprint = flask.Blueprint("embeddings", __name__)


@blueprint.post("/v1/embeddings")
def create() -> flask.Response:
    """Embed texts."""
    context = current()
    request = read_body(EmbeddingRequest)
    context.check_model(request.model)
    context.engine_info()
    prompts = read_prompts(context, request.input, "input")
    params = make_params(
        context,
        num_prompt_tokens=max(len(prompt) for prompt in prompts),
        max_tokens=1,
        temperature=0.0,
        pooling=request.pooling,
    )
    generation = Generation(context, fan_out(prompts, params, 1))
    # A mean needs every token's hidden state, so nothing may come from the prefix cache.
    generation.cache_salt = generation.id
    generation.run(flask.request.environ)
    data = [
        {
            "object": "embedding",
            "index": choice.index,
            "embedding": _encode(_vector(choice), request.encoding_format),
        }
        for choice in generation.choices
    ]
    tokens = sum(len(prompt) for prompt in prompts)
    return flask.jsonify(
        {
            "object": "list",
            "data": data,
            "model": context.model_name,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
    )


def _vector(choice: Choice) -> list[float]:
    """A choice's embedding at unit length."""
    if choice.result is None or choice.result.embedding is None:
        raise ApiError(500, "the engine gave no embedding", code="internal_error")
    values = choice.result.embedding
    length = math.sqrt(sum(value * value for value in values)) or 1.0
    return [value / length for value in values]


def _encode(vector: list[float], encoding: str) -> Any:
    if encoding == "float":
        return vector
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
