"""LLM: the offline API, shaped as vLLM's."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypedDict

from tqdm import tqdm

from refengine.config import EngineConfig
from refengine.errors import RequestError
from refengine.factory import build_engine
from refengine.request import RequestOutput
from refengine.sampling_params import SamplingParams


class TokensPrompt(TypedDict):
    """A prompt given as token ids."""

    prompt_token_ids: Sequence[int]


class TextPrompt(TypedDict):
    """A prompt given as text."""

    prompt: str


Prompt = str | TextPrompt | TokensPrompt
Message = Mapping[str, Any]


class LLM:
    """A model, ready to generate.

    Args:
        model: a directory as Hugging Face lays it out, a GGUF file, a hub id, or "smollm2", a
            small model that is fetched on first use.
        progress: show progress bars on standard error while loading.
        **options: any field of ``EngineConfig``.

    Raises:
        RefengineError: where the model cannot be loaded.
        ValueError: where an option has no such name or value.

    Example:
        >>> llm = LLM("smollm2")
        >>> params = SamplingParams(temperature=0, max_tokens=8)
        >>> llm.generate("The capital of France is", params)[0].outputs[0].text
        ' Paris.'
    """

    def __init__(self, model: str = "smollm2", *, progress: bool = False, **options: Any) -> None:
        known = EngineConfig.__dataclass_fields__
        for name in options:
            if name not in known:
                raise ValueError(f"LLM has no option {name!r}; there are {', '.join(known)}")
        self._load(EngineConfig(model=model, **options), progress)

    @classmethod
    def from_config(cls, config: EngineConfig, *, progress: bool = False) -> LLM:
        """The same, from an ``EngineConfig``."""
        llm = cls.__new__(cls)
        llm._load(config, progress)
        return llm

    def _load(self, config: EngineConfig, progress: bool) -> None:
        self.config = config
        self.loaded = build_engine(config, progress=progress)
        self.engine = self.loaded.engine
        self._num_requests = 0
        self._outputs: dict[str, deque[RequestOutput]] = {}

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Generate an answer for every prompt, all of them in one continuous batch.

        Args:
            prompts: texts, or ``{"prompt_token_ids": [...]}``; one or many.
            sampling_params: one for all, or one a prompt; None means the defaults.
            use_tqdm: show a progress bar on standard error.
            priority: one number a prompt; smaller is sooner.

        Returns:
            One output a prompt, in the prompts' order.

        Raises:
            RequestError: where a prompt cannot be served; nothing is generated then.
        """
        single = isinstance(prompts, (str, Mapping))
        prompt_list: list[Any] = [prompts] if single else list(prompts)
        params = _one_for_each(sampling_params, len(prompt_list))
        ids = self._add(prompt_list, params, priority=priority)
        try:
            return self._run(ids, use_tqdm=use_tqdm)
        finally:
            # Whatever stopped it, an error or Ctrl-C, leaves no request behind.
            self._abort(ids)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """Generate one answer and yield it piece by piece.

        Each output holds what is new since the one before. Closing the iterator aborts the request;
        other calls may be made while it is open.
        """
        (request_id,) = self._add([prompt], [sampling_params or SamplingParams()], stream=True)
        return self._pieces(request_id)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
    ) -> list[RequestOutput]:
        """Generate the next message of one conversation, or of many.

        Args:
            messages: ``[{"role": "user", "content": "..."}, ...]``, or a list of such lists.
            sampling_params: as in ``generate``.
            use_tqdm: show a progress bar on standard error.
            add_generation_prompt: end the text where the assistant's answer begins.
            tools: descriptions of functions, for models whose template has a place for them.
            chat_template: a Jinja template to use instead of the model's own.

        Raises:
            RequestError: where the model has no chat template or the template refuses the messages.
        """
        if not messages:
            raise RequestError("messages is empty; give at least one message")
        conversations: Any = [messages] if isinstance(messages[0], Mapping) else messages
        prompts = [
            self.render_chat(
                conversation,
                add_generation_prompt=add_generation_prompt,
                tools=tools,
                chat_template=chat_template,
            )
            for conversation in conversations
        ]
        outputs = self.generate(
            [{"prompt_token_ids": token_ids} for _, token_ids in prompts],
            sampling_params,
            use_tqdm=use_tqdm,
        )
        texts = [text for text, _ in prompts]
        return [replace(output, prompt=text) for output, text in zip(outputs, texts, strict=True)]

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
    ) -> tuple[str, list[int]]:
        """A conversation as the model reads it: its text and its token ids."""
        return self.loaded.render_chat(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            chat_template=chat_template,
        )

    def close(self) -> None:
        """Release the model's memory."""
        self.engine.close()

    def _add(
        self,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams],
        *,
        priority: Sequence[int] | None = None,
        stream: bool = False,
    ) -> list[str]:
        """Queue requests, all of them or none."""
        ids: list[str] = []
        try:
            for index, (prompt, own) in enumerate(zip(prompts, params, strict=True)):
                self._num_requests += 1
                request_id = str(self._num_requests)
                self.engine.add_request(
                    request_id,
                    _prompt_value(prompt),
                    own,
                    stream=stream,
                    priority=priority[index] if priority else 0,
                )
                self._outputs[request_id] = deque()
                ids.append(request_id)
        except BaseException:
            self._abort(ids)
            raise
        return ids

    def _abort(self, ids: Sequence[str]) -> None:
        """Forget requests; those that ended have nothing left to free."""
        for request_id in ids:
            self.engine.abort_request(request_id)
            self._outputs.pop(request_id, None)

    def _step(self) -> None:
        """Compute one step and hand each output to the call that waits for it."""
        for output in self.engine.step():
            self._outputs[output.request_id].append(output)

    def _pieces(self, request_id: str) -> Iterator[RequestOutput]:
        """A streamed request's outputs as they come."""
        try:
            finished = False
            while not finished:
                while not self._outputs[request_id]:
                    self._step()
                output = self._outputs[request_id].popleft()
                finished = output.finished
                yield output
        finally:
            self._abort([request_id])

    def _run(self, ids: Sequence[str], *, use_tqdm: bool) -> list[RequestOutput]:
        """Step until every request has ended."""
        waiting = set(ids)
        with tqdm(total=len(ids), desc="generating", unit="request", disable=not use_tqdm) as bar:
            tokens = 0
            while waiting:
                self._step()
                ended = [request_id for request_id in waiting if self._outputs[request_id]]
                for request_id in ended:
                    tokens += len(self._outputs[request_id][0].outputs[0].token_ids)
                waiting.difference_update(ended)
                bar.update(len(ended))
                elapsed = bar.format_dict["elapsed"]
                bar.set_postfix_str(f"{tokens / max(elapsed, 1e-9):.1f} output tokens/s", False)
        return [self._outputs[request_id][0] for request_id in ids]


def _one_for_each(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise RequestError(
            f"sampling_params has {len(params)} entries for {count} prompts; give one, or as many"
        )
    return list(params)


def _prompt_value(prompt: Any) -> str | Sequence[int]:
    """A prompt's text or token ids."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Mapping):
        if "prompt_token_ids" in prompt:
            return list(prompt["prompt_token_ids"])
        if "prompt" in prompt:
            return str(prompt["prompt"])
    raise RequestError(
        'a prompt must be a text, {"prompt": text} or {"prompt_token_ids": [...]}, '
        f"got {prompt!r}"
    )
