"""What OpenAI's routes take: every field works, or is refused by name.

``/openapi.json`` is made from these models. Fields that clients send and that change nothing here
are listed as such; fields of OpenAI's API that this server cannot honour are in ``unsupported``,
with the reason that the refusal gives.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from refengine.sampling_params import MAX_LOGPROBS

MAX_CHOICES = 64
MAX_PROMPTS = 256
MAX_STOPS = 16

Stop = Annotated[str, Field(min_length=1, max_length=1000)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**64 - 1)]


class Strict(BaseModel):
    """No unknown fields, and no guessing: "1" is not 1."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    unsupported: ClassVar[dict[str, str]] = {}


class StreamOptions(Strict):
    """What a stream holds besides the answer."""

    include_usage: bool = Field(False, description="End with a chunk that has the usage.")


class JsonSchema(Strict):
    """The schema of a structured answer."""

    name: str = Field(max_length=64)
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(None, description="Answers always follow the schema.")


class TextFormat(Strict):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(Strict):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")
]


class SamplingFields(Strict):
    """What both generating routes take; names beyond OpenAI's are vLLM's."""

    model: str = Field(description="As /v1/models names it.")
    temperature: float = Field(1.0, ge=0, le=100, description="0 is greedy.")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=2**31 - 1, description="0 or -1 keeps all tokens.")
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, description="By token id."
    )
    bad_words: list[Stop] | None = Field(None, max_length=64)
    n: int = Field(1, ge=1, le=MAX_CHOICES, description="Choices.")
    min_tokens: int = Field(0, ge=0, le=2**31 - 1)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: list[TokenId] | None = Field(None, max_length=64)
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    seed: Seed | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    guided_regex: str | None = Field(None, max_length=16384)
    guided_grammar: str | None = Field(None, max_length=65536, description="Lark.")
    priority: int = Field(0, ge=-(2**31), le=2**31 - 1, description="Smaller is sooner.")
    cache_salt: str | None = Field(
        None, min_length=1, max_length=256, description="Cached prefixes are shared within it."
    )
    user: str | None = Field(None, description="Taken and not used.")


class CompletionRequest(SamplingFields):
    """``POST /v1/completions``."""

    unsupported: ClassVar[dict[str, str]] = {
        "suffix": "no model here fills in the middle",
    }

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1)]],
            Field(min_length=1, max_length=MAX_PROMPTS),
        ]
    ) = Field(description="One text or list of token ids, or several.")
    max_tokens: int | None = Field(
        16, ge=0, le=2**31 - 1, description="0 only with echo: scores the prompt."
    )
    best_of: int | None = Field(
        None, ge=1, le=MAX_CHOICES, description="Make this many, give the n likeliest a token."
    )
    echo: bool = Field(False, description="Begin with the prompt.")
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)


class FunctionCall(Strict):
    """A call that the model made."""

    name: str
    arguments: str = Field(description="JSON.")


class ToolCall(Strict):
    """A call in an assistant's message."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    """A message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = Field(None, description="Taken and not used.")


class FunctionDefinition(Strict):
    """A function that the model may call."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON schema.")
    strict: bool | None = Field(None, description="Forced calls always follow the schema.")


class Tool(Strict):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(Strict):
    """The name of a function."""

    name: str


class NamedToolChoice(Strict):
    """The one function that must be called."""

    type: Literal["function"]
    function: FunctionName


_NO_MEDIA = "this server makes text only"
_OLD_TOOLS = "use tools and tool_choice"


class ChatRequest(SamplingFields):
    """``POST /v1/chat/completions``."""

    unsupported: ClassVar[dict[str, str]] = {
        "audio": _NO_MEDIA,
        "modalities": _NO_MEDIA,
        "functions": _OLD_TOOLS,
        "function_call": _OLD_TOOLS,
        "prediction": "answers are not predicted here",
        "reasoning_effort": "no model here takes an effort",
        "verbosity": "no model here takes a verbosity",
        "web_search_options": "there is no web search",
    }

    messages: list[ChatMessage] = Field(min_length=1, max_length=4096)
    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool = Field(True, description="False: at most one call.")
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, max_length=16, description="Whatever else the template knows."
    )
    metadata: dict[str, str] | None = Field(None, description="Taken and not used.")
    store: Literal[False] | None = Field(None, description="Nothing is stored.")
    service_tier: Literal["auto", "default"] | None = Field(None, description="There is one.")
    prompt_cache_key: str | None = Field(None, description="Taken and not used.")
    safety_identifier: str | None = Field(None, description="Taken and not used.")


class EmbeddingRequest(Strict):
    """``POST /v1/embeddings``."""

    unsupported: ClassVar[dict[str, str]] = {
        "dimensions": "embeddings have the model's hidden size",
    }

    model: str
    input: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1)]],
            Field(min_length=1, max_length=MAX_PROMPTS),
        ]
    )
    encoding_format: Literal["float", "base64"] = "float"
    pooling: Literal["mean", "last"] = Field(
        "mean", description="Of the hidden states after the final norm."
    )
    user: str | None = Field(None, description="Taken and not used.")


class TokenizeRequest(Strict):
    """``POST /tokenize``: a prompt, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1)
    add_special_tokens: bool = True
    add_generation_prompt: bool = True


class DetokenizeRequest(Strict):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: list[TokenId] = Field(max_length=1_000_000)
    skip_special_tokens: bool = False
