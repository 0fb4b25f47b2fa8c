"""Kernels with other signatures and cache layouts, called as the contract says.

``--adapter NAME`` on the command line; in Python ``adapt(function, kernel, name, layout)``. The
arrays stay the library's own (NumPy, torch or CuPy): only methods that all of them have are used.
Signatures are those of the projects' documentation; docs/kernel_suite.md shows each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

from refengine.errors import RefengineError

Function = Callable[..., Any]
LAYOUTS = ("NHD", "HND")


def adapt(function: Function, kernel: str, adapter: str | None, layout: str = "NHD") -> Function:
    """The function as one of the contract's.

    Args:
        function: what to call.
        kernel: the contract's name for it.
        adapter: a name of ``ADAPTERS``, or None where only the layout differs, or nothing.
        layout: "HND" where its caches are ``[num_blocks, num_kv_heads, block_size, head_dim]``.

    Raises:
        RefengineError: where there is no such adapter for the kernel.
    """
    if layout not in LAYOUTS:
        raise RefengineError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if adapter is not None:
        known = ADAPTERS.get(adapter)
        if known is None:
            raise RefengineError(f"adapter must be one of {', '.join(ADAPTERS)}, got {adapter!r}")
        if kernel not in known:
            raise RefengineError(f"adapter {adapter} is for {', '.join(known)}, not for {kernel}")
        function = known[kernel](function)
    if layout == "HND":
        if kernel not in ("paged_attention", "write_kv"):
            raise RefengineError(f"layout HND is for paged_attention and write_kv, not {kernel}")
        function = _heads_first(function, kernel)
    return function


# ------------------------------------------------------------------------------ cache layouts


def _heads_first(function: Function, kernel: str) -> Function:
    """Give the caches with heads before slots; what was written goes back."""
    from refengine.conformance.calling import call_plain
    from refengine.conformance.kernels import find_kernel

    spec = find_kernel(kernel)

    def call(*arguments: Any) -> Any:
        values = dict(zip(spec.arguments, arguments, strict=True))
        caches = {name: values[name] for name in ("key_cache", "value_cache")}
        turned = {name: _contiguous(_turn(cache)) for name, cache in caches.items()}
        result = call_plain(function, spec, {**values, **turned})
        if kernel == "write_kv":
            for name, cache in caches.items():
                cache[...] = _turn(turned[name])
        return result

    return call


def _turn(cache: Any) -> Any:
    return cache.swapaxes(1, 2)


def _contiguous(array: Any) -> Any:
    return array.contiguous() if hasattr(array, "contiguous") else array.copy()


# ------------------------------------------------------------------------------ vLLM


def _vllm_attention(function: Function) -> Function:
    """``unified_attention`` of ``vllm.v1.attention.ops.triton_unified_attention``."""

    def call(
        query: Any, key_cache: Any, value_cache: Any, block_tables: Any, seq_lens: Any,
        query_start_loc: Any, scale: float, sliding_window: int | None,
        logits_soft_cap: float | None, out: Any,
    ) -> None:  # fmt: skip
        result = function(
            q=query,
            k=key_cache,
            v=value_cache,
            out=out,
            cu_seqlens_q=query_start_loc,
            max_seqlen_q=_longest(query_start_loc),
            seqused_k=seq_lens,
            max_seqlen_k=_greatest(seq_lens),
            softmax_scale=scale,
            causal=True,
            window_size=_window(sliding_window),
            block_table=block_tables,
            softcap=logits_soft_cap or 0.0,
            q_descale=None,
            k_descale=None,
            v_descale=None,
        )
        if result is not None and result is not out:
            out[...] = result

    return call


def _vllm_write(function: Function) -> Function:
    """``reshape_and_cache_flash`` of vLLM."""

    def call(key: Any, value: Any, key_cache: Any, value_cache: Any, slot_mapping: Any) -> None:
        function(key, value, key_cache, value_cache, slot_mapping, "auto", 1.0, 1.0)

    return call


def _vllm_norm(function: Function) -> Function:
    """``rms_norm(out, input, weight, epsilon)`` of ``vllm._custom_ops``."""
    return lambda x, weight, eps, out: function(out, x, weight, eps)


def _vllm_silu(function: Function) -> Function:
    """``silu_and_mul(out, x)`` of ``torch.ops._C``."""
    return lambda x, out: function(out, x)


def _vllm_rotary(function: Function) -> Function:
    """``rotary_embedding(positions, query, key, head_size, cos_sin_cache, is_neox)`` of vLLM.

    Query and key are ``[num_tokens, num_heads * head_size]`` there.
    """

    def call(positions: Any, query: Any, key: Any, cos_sin_cache: Any) -> None:
        rows = [_contiguous(heads).reshape(heads.shape[0], -1) for heads in (query, key)]
        table = cos_sin_cache
        function(positions, *rows, query.shape[2], table, True)
        for heads, flat in zip((query, key), rows, strict=True):
            heads[...] = flat.reshape(heads.shape)

    return call


# ------------------------------------------------------------------------------ FlashAttention


def _flash_attention(function: Function) -> Function:
    """``flash_attn_varlen_func`` with a ``block_table`` (FlashAttention 2.5 and later)."""

    def call(
        query: Any, key_cache: Any, value_cache: Any, block_tables: Any, seq_lens: Any,
        query_start_loc: Any, scale: float, sliding_window: int | None,
        logits_soft_cap: float | None, out: Any,
    ) -> None:  # fmt: skip
        out[...] = function(
            query,
            key_cache,
            value_cache,
            query_start_loc,  # cu_seqlens_q
            _like(query_start_loc, _running_sum(_list(seq_lens))),  # cu_seqlens_k
            _longest(query_start_loc),
            _greatest(seq_lens),
            softmax_scale=scale,
            causal=True,
            window_size=_window(sliding_window),
            softcap=logits_soft_cap or 0.0,
            block_table=block_tables,
        )

    return call


# ------------------------------------------------------------------------------ FlashInfer


def _flashinfer(target: Any) -> Function:
    """``BatchPrefillWithPagedKVCacheWrapper`` (an object, or a function that makes one).

    Its ``plan`` gets the page table as compressed rows, ``run`` the query and both caches.
    """
    is_wrapper = hasattr(target, "plan") and not isinstance(target, type)
    wrapper = target if is_wrapper else target()

    def call(
        query: Any, key_cache: Any, value_cache: Any, block_tables: Any, seq_lens: Any,
        query_start_loc: Any, scale: float, sliding_window: int | None,
        logits_soft_cap: float | None, out: Any,
    ) -> None:  # fmt: skip
        block_size = int(key_cache.shape[1])
        lengths, table = _list(seq_lens), block_tables.tolist()
        pages = [-(-length // block_size) for length in lengths]
        indices = [b for row, count in zip(table, pages, strict=True) for b in row[:count]]
        last = [(length - 1) % block_size + 1 if length else 0 for length in lengths]
        wrapper.plan(
            query_start_loc,
            _like(seq_lens, _running_sum(pages)),
            _like(seq_lens, indices),
            _like(seq_lens, last),
            int(query.shape[1]),
            int(key_cache.shape[2]),
            int(query.shape[2]),
            block_size,
            causal=True,
            sm_scale=scale,
            window_left=-1 if sliding_window is None else sliding_window - 1,
            logits_soft_cap=logits_soft_cap or 0.0,
            q_data_type=query.dtype,
            kv_data_type=key_cache.dtype,
        )
        out[...] = wrapper.run(query, (key_cache, value_cache))

    return call


# ------------------------------------------------------------------------------ what they share


def _window(sliding_window: int | None) -> tuple[int, int]:
    """(tokens before, tokens after) besides a token itself; -1 is no limit."""
    return (-1, -1) if sliding_window is None else (sliding_window - 1, 0)


def _list(array: Any) -> list[int]:
    return [int(x) for x in array.tolist()]


def _greatest(array: Any) -> int:
    return max(_list(array), default=0)


def _longest(starts: Any) -> int:
    numbers = _list(starts)
    return max((b - a for a, b in pairwise(numbers)), default=0)


def _running_sum(numbers: list[int]) -> list[int]:
    out = [0]
    for number in numbers:
        out.append(out[-1] + number)
    return out


def _like(array: Any, numbers: list[int]) -> Any:
    """Integers as an array of the same library, dtype and device."""
    if hasattr(array, "new_tensor"):
        return array.new_tensor(numbers)
    if type(array).__module__.startswith("cupy"):
        import cupy

        return cupy.array(numbers, array.dtype)
    import numpy as np

    return np.array(numbers, array.dtype)


ADAPTERS: Mapping[str, Mapping[str, Callable[[Any], Function]]] = {
    "vllm": {
        "paged_attention": _vllm_attention,
        "write_kv": _vllm_write,
        "rms_norm": _vllm_norm,
        "silu_and_mul": _vllm_silu,
        "rotary_embedding": _vllm_rotary,
    },
    "flash_attn": {"paged_attention": _flash_attention},
    "flashinfer": {"paged_attention": _flashinfer},
}
