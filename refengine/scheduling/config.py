"""SchedulerConfig: the limits and choices of a scheduler, and which requests they refuse."""

from __future__ import annotations

from dataclasses import dataclass

from refengine.errors import RequestError
from refengine.request import Request
from refengine.scheduling.policies import load_policy

CHOICES = {
    "preemption_mode": ("recompute", "swap", "auto"),
    "kv_allocation": ("paged", "static"),
    "batching": ("continuous", "static", "none"),
}
POSITIVE = ("num_blocks", "block_size", "max_model_len", "max_num_seqs", "max_num_batched_tokens",
            "max_queue")  # fmt: skip
NOT_NEGATIVE = ("long_prefill_token_threshold", "num_host_blocks", "swap_seconds_per_block",
                "recompute_seconds_per_token")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits and choices of a scheduler.

    Raises:
        ValueError: where a number is too small, or a name is not one of those known.
    """

    num_blocks: int  # of the KV cache
    block_size: int = 16  # tokens
    max_model_len: int = 2048  # tokens that a request may have, prompt and output
    max_num_seqs: int = 256  # requests in one step
    max_num_batched_tokens: int = 2048  # tokens in one step
    enable_chunked_prefill: bool = True  # False: a prompt is computed in one step or not at all
    long_prefill_token_threshold: int = 0  # tokens of one prompt in one step; 0: no such limit
    policy: str = "fcfs"  # a name in policies.py, or "module:Class"
    max_queue: int | None = None  # requests that may wait
    enable_prefix_caching: bool = True
    preemption_mode: str = "recompute"  # "swap" recomputes where host memory is full
    num_host_blocks: int = 0  # host memory to swap to
    # What "auto" compares: moving one block one way, against computing one token again.
    swap_seconds_per_block: float = 0.0
    recompute_seconds_per_token: float = 0.0
    # The yardsticks: "static" memory reserves max_model_len tokens a request, "static" batches
    # admit nobody before all members have ended, and "none" serves one request at a time.
    kv_allocation: str = "paged"
    batching: str = "continuous"

    def __post_init__(self) -> None:
        """Check every field."""
        for name in POSITIVE + NOT_NEGATIVE:
            value, least = getattr(self, name), int(name in POSITIVE)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        load_policy(self.policy)

    @property
    def reserved_tokens(self) -> int:
        """Tokens that a request gets room for on admission, however long it becomes."""
        return self.max_model_len if self.kv_allocation == "static" else 0

    def prefers_swap(self, num_tokens: int) -> bool:
        """Whether a victim that has computed so many tokens is better swapped out and in again."""
        if self.preemption_mode != "auto":
            return self.preemption_mode == "swap"
        swap = 2 * -(-num_tokens // self.block_size) * self.swap_seconds_per_block
        return swap < num_tokens * self.recompute_seconds_per_token

    def final_length(self, request: Request) -> int:
        """Tokens, prompt and output, at which a request ends.

        Raises:
            RequestError: if it can never be served within these limits.
        """
        name, prompt = f"request {request.request_id!r}", request.num_prompt_tokens
        if prompt == 0:
            raise RequestError(f"{name} has an empty prompt: give it at least 1 token")
        if prompt >= self.max_model_len:
            raise RequestError(
                f"{name} has a prompt of {prompt} tokens, and max_model_len is "
                f"{self.max_model_len}, prompt and at least 1 new token together: shorten the "
                "prompt or raise max_model_len"
            )
        if prompt > self.max_num_batched_tokens and not self.enable_chunked_prefill:
            raise RequestError(
                f"{name} has a prompt of {prompt} tokens, a step takes "
                f"{self.max_num_batched_tokens} (max_num_batched_tokens) and chunked prefill is "
                "off: shorten the prompt, raise the limit or enable chunked prefill"
            )
        max_tokens = request.sampling_params.max_tokens
        length = self.max_model_len
        if max_tokens is not None:
            length = min(length, prompt + max_tokens)
        # The last token is never computed: nothing comes after it.
        needed = -(-max(length - 1, self.reserved_tokens) // self.block_size)
        if needed > self.num_blocks:
            raise RequestError(
                f"{name} may grow to {length} tokens and needs {needed} blocks of "
                f"{self.block_size}, and the whole KV cache has {self.num_blocks}: lower "
                "max_tokens or give the cache more memory"
            )
        return length
