"""What Ollama's routes take (https://github.com/ollama/ollama/blob/main/docs/api.md)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from refengine.server.schemas import MAX_STOPS, Seed, Stop, Strict, Tool

_NO_IMAGES = "no model here sees images"


class OllamaOptions(Strict):
    """``options`` of a request."""

    unsupported: ClassVar[dict[str, str]] = {}

    temperature: float = Field(0.8, ge=0, le=100)
    top_k: int = Field(40, ge=0, le=2**31 - 1)
    top_p: float = Field(0.9, gt=0, le=1)
    min_p: float = Field(0.0, ge=0, le=1)
    repeat_penalty: float = Field(1.1, gt=0, le=100)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    seed: Seed | None = None
    num_predict: int = Field(-1, ge=-2, le=2**31 - 1, description="-1, -2: to the end.")
    num_ctx: int | None = Field(
        None, ge=1, le=2**31 - 1, description="Tokens of prompt and answer together."
    )
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None


class OllamaRequest(Strict):
    """What both generating routes take."""

    model: str
    stream: bool = True
    options: OllamaOptions | None = None
    format: Literal["", "json"] | dict[str, Any] | None = Field(
        None, description='"json", or a JSON schema.'
    )
    keep_alive: str | float | None = Field(None, description="Taken; the model stays loaded.")
    think: Literal[False] | None = Field(None, description="No model here thinks.")


class OllamaFunctionCall(Strict):
    """A call that the model made."""

    name: str
    arguments: dict[str, Any]


class OllamaToolCall(Strict):
    """A call in an assistant's message."""

    function: OllamaFunctionCall


class OllamaMessage(Strict):
    """A message of the conversation."""

    unsupported: ClassVar[dict[str, str]] = {"images": _NO_IMAGES}

    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    tool_calls: list[OllamaToolCall] | None = None
    tool_name: str | None = None


class OllamaChatRequest(OllamaRequest):
    """``POST /api/chat``."""

    messages: list[OllamaMessage] = Field(default_factory=list, max_length=4096)
    tools: list[Tool] | None = Field(None, max_length=128)


class OllamaGenerateRequest(OllamaRequest):
    """``POST /api/generate``."""

    unsupported: ClassVar[dict[str, str]] = {
        "suffix": "no model here fills in the middle",
        "images": _NO_IMAGES,
        "template": "the model's own template is used; raw skips it",
        "context": "send the conversation to /api/chat",
    }

    prompt: str = ""
    system: str | None = None
    raw: bool = Field(False, description="Take the prompt as it is, without a template.")
