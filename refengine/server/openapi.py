"""``/openapi.json``, made from the models that validate requests."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from refengine._version import __version__
from refengine.server.ollama_schemas import OllamaChatRequest, OllamaGenerateRequest
from refengine.server.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)

# Route, summary, body, whether it may stream, and the type of a stream.
POSTS: tuple[tuple[str, str, type[BaseModel], str | None], ...] = (
    ("/v1/chat/completions", "Answer a conversation", ChatRequest, "text/event-stream"),
    ("/v1/completions", "Continue a text", CompletionRequest, "text/event-stream"),
    ("/v1/embeddings", "Embed texts", EmbeddingRequest, None),
    ("/tokenize", "Text or a conversation to token ids", TokenizeRequest, None),
    ("/detokenize", "Token ids to text", DetokenizeRequest, None),
    ("/api/chat", "Ollama: answer a conversation", OllamaChatRequest, "application/x-ndjson"),
    ("/api/generate", "Ollama: answer a prompt", OllamaGenerateRequest, "application/x-ndjson"),
)
GETS: tuple[tuple[str, str, str], ...] = (
    ("/v1/models", "The models that are served", "application/json"),
    ("/health", "Whether requests are served", "application/json"),
    ("/version", "This server's version", "application/json"),
    ("/metrics", "Prometheus metrics", "text/plain"),
    ("/api/tags", "Ollama: the models that are served", "application/json"),
    ("/api/version", "Ollama: this server's version", "application/json"),
)
STATUSES = {
    "400": "A field that is wrong or not supported, named in the error",
    "401": "No API key, or a wrong one",
    "403": "A browser's request from another site",
    "404": "No such model",
    "413": "A body that is too large",
    "415": "A body that is not JSON by its content type",
    "429": "The queue is full; Retry-After says when to come again",
    "503": "No engine, or shutting down",
    "504": "The answer took too long",
}


@lru_cache(maxsize=1)
def document() -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    models = [(model, "validation") for _, _, model, _ in POSTS]
    _, definitions = models_json_schema(
        models,  # type: ignore[arg-type]
        ref_template="#/components/schemas/{model}",
    )
    schemas: dict[str, Any] = definitions["$defs"]
    schemas["Error"] = {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": ["string", "null"]},
                },
            }
        },
    }
    schemas["OllamaError"] = {
        "type": "object",
        "required": ["error"],
        "properties": {"error": {"type": "string"}},
    }
    paths: dict[str, Any] = {}
    for path, summary, model, stream in POSTS:
        content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
        if stream is not None:
            content[stream] = {"schema": {"type": "string"}}
        paths[path] = {
            "post": {
                "summary": summary,
                "operationId": "post" + path.replace("/", "_"),
                "requestBody": {
                    "required": True,
                    "content": {
                        "application/json": {
                            "schema": {"$ref": f"#/components/schemas/{model.__name__}"}
                        }
                    },
                },
                "responses": {"200": {"description": "The answer", "content": content}}
                | _errors(path, STATUSES),
            }
        }
    for path, summary, kind in GETS:
        statuses = {"401": STATUSES["401"]}
        if path == "/health":
            statuses = {"503": STATUSES["503"]}
        schema = {"type": "string"} if kind == "text/plain" else {"type": "object"}
        paths[path] = {
            "get": {
                "summary": summary,
                "operationId": "get" + path.replace("/", "_"),
                "responses": {
                    "200": {"description": "The answer", "content": {kind: {"schema": schema}}}
                }
                | (
                    _errors(path, statuses)
                    if path != "/health"
                    else {
                        "503": {
                            "description": "Not now",
                            "content": {"application/json": {"schema": {"type": "object"}}},
                        }
                    }
                ),
            }
        }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "refengine",
            "version": __version__,
            "description": "OpenAI's and Ollama's routes. A field that is not listed is refused.",
        },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _errors(path: str, statuses: dict[str, str]) -> dict[str, Any]:
    name = "OllamaError" if path.startswith("/api/") else "Error"
    schema = {"$ref": f"#/components/schemas/{name}"}
    return {
        status: {"description": text, "content": {"application/json": {"schema": schema}}}
        for status, text in statuses.items()
    }
