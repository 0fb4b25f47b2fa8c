"""ServerConfig, and the one object that all routes share."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import flask

from refengine.errors import RequestError
from refengine.execution.structured_output import StructuredOutputs
from refengine.models.chat_template import ChatTemplate
from refengine.models.tokenizer import Tokenizer
from refengine.sampling_params import StructuredOutput
from refengine.server.disconnects import Disconnects
from refengine.server.engine_client import EngineClient
from refengine.server.errors import ApiError, invalid
from refengine.server.messages import EngineInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """How to serve; every field is a flag of ``refengine serve``."""

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: str = "smollm2"
    api_key: str | None = None
    max_body_bytes: int = 8 * 2**20
    request_timeout: float = 600.0  # seconds
    max_queue: int = 256  # requests in flight beyond max_num_seqs
    shutdown_timeout: float = 30.0  # seconds
    cors_origins: tuple[str, ...] = ()
    restart_engine: bool = False


@dataclass(slots=True)
class Context:
    """What the routes need: the engine, the model's words, the limits."""

    config: ServerConfig
    client: EngineClient
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    structures: StructuredOutputs
    max_num_seqs: int
    disconnects: Disconnects = field(default_factory=Disconnects)
    created: int = field(default_factory=lambda: int(time.time()))
    draining: bool = False

    @property
    def model_name(self) -> str:
        """As ``/v1/models`` names it."""
        return self.config.served_model_name

    def check_model(self, name: str) -> None:
        """Refuse a model that isn't served.

        Raises:
            ApiError: 404.
        """
        # Ollama's clients add a tag.
        if name.removesuffix(":latest") != self.model_name:
            raise ApiError(
                404,
                f"there is no model {name!r} here; this server has {self.model_name!r}",
                param="model",
                code="model_not_found",
            )

    def engine_info(self) -> EngineInfo:
        """The running engine's numbers.

        Raises:
            ApiError: 503 while there is none, or the server is draining.
        """
        if self.draining:
            raise ApiError(
                503,
                "the server is shutting down",
                code="draining",
                headers={"Retry-After": "5"},
            )
        info = self.client.info
        if info is None:
            raise unavailable(self.client.reason)
        return info

    def limit_in_flight(self, num_requests: int) -> int:
        """Engine requests that may be in flight.

        Raises:
            ApiError: 400 where so many could never be.
        """
        limit = self.max_num_seqs + self.config.max_queue
        if num_requests > limit:
            raise ApiError(
                400,
                f"this asks for {num_requests} answers at once; at most {limit} can be in flight",
                code="too_many_choices",
            )
        return limit

    def check_structure(self, structure: StructuredOutput | None, param: str) -> None:
        """Compile a structure, so that the engine meets none that it can't.

        Raises:
            ApiError: 400.
        """
        if structure is None:
            return
        try:
            self.structures.matcher(structure)
        except RequestError as error:
            raise invalid(param, str(error)) from None


def unavailable(reason: str) -> ApiError:
    """There is no engine to answer."""
    return ApiError(503, reason, code="engine_unavailable", headers={"Retry-After": "5"})


def current() -> Context:
    """The running application's context."""
    context: Context = flask.current_app.extensions["refengine"]
    return context
