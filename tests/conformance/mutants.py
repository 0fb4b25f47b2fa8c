"""The planted mistakes, by name: what each is, and where a report should say that it shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mutant_kernels as kernels

from refengine.conformance.problem import Problem
from refengine.conformance.report import Failure

Where = Callable[[Problem, Failure], bool]


@dataclass(frozen=True)
class Mutant:
    """One planted mistake."""

    kernel: str
    bugs: dict[str, Any]
    hint: str = ""  # a part of the hint that it should get
    where: Where | None = None
    dtypes: tuple[str, ...] = ("float32",)
    quick: bool = True

    @property
    def function(self) -> Callable[..., Any]:
        maker = {"paged_attention": "attention"}.get(self.kernel, self.kernel)
        return getattr(kernels, maker)(**self.bugs)


def at_slot(offset: Callable[[Problem, Failure], int]) -> Where:
    """The slot of the sequence's token at position + offset."""

    def where(problem: Problem, failure: Failure) -> bool:
        a = problem.arguments
        block_size = a["key_cache"].shape[1]
        position = failure.position + offset(problem, failure)
        block = int(a["block_tables"][failure.sequence, position // block_size])
        return failure.slot == block * block_size + position % block_size and (
            failure.block == block
        )

    return where


def past_end(problem: Problem, failure: Failure) -> bool:
    """The first slot after the sequence's last."""
    a = problem.arguments
    length = int(a["seq_lens"][failure.sequence])
    there = at_slot(lambda p, f: length - f.position)
    return there(problem, failure)


def window(problem: Problem) -> int:
    return problem.arguments["sliding_window"]


def in_last_block(problem: Problem, failure: Failure) -> bool:
    a = problem.arguments
    length, size = int(a["seq_lens"][failure.sequence]), a["key_cache"].shape[1]
    return failure.block == int(a["block_tables"][failure.sequence, (length - 1) // size])


def destination(problem: Problem, failure: Failure) -> bool:
    return failure.block in problem.arguments["block_mapping"][:, 1]


def dims_from(first: int) -> Where:
    return lambda problem, failure: failure.dim >= first


def attention(
    hint: str = "", where: Where | None = None, quick: bool = True, **bugs: Any
) -> Mutant:
    return Mutant("paged_attention", bugs, hint, where, quick=quick)


def written(slots: Callable[[Problem], Any]) -> Where:
    return lambda problem, failure: failure.slot in slots(problem)


def real_slots(problem: Problem) -> set[int]:
    slots = problem.arguments["slot_mapping"]
    return set(slots[slots >= 0].tolist())


def last_slot(problem: Problem) -> set[int]:
    shape = problem.arguments["key_cache"].shape
    return {shape[0] * shape[1] - 1}


MUTANTS: dict[str, Mutant] = {
    "causal one ahead": attention("one token too many", at_slot(lambda p, f: 1), causal="ahead"),
    "causal one behind": attention("not see itself", at_slot(lambda p, f: 0), causal="behind"),
    "not causal": attention("no causal mask", causal="none"),
    "causal from the chunk's start": attention("context before it is not counted", top_left=True),
    "window one too long": attention(
        "window one token too long", at_slot(lambda p, f: -window(p)), window=1
    ),
    "window one too short": attention(
        "window one token too short", at_slot(lambda p, f: 1 - window(p)), window=-1
    ),
    "window ignored": attention("sliding window ignored", no_window=True),
    "pages skipped by the last query": attention(skips_by_last=True),
    "soft cap ignored": attention("soft cap ignored", cap="ignored"),
    "soft cap after the mask": attention("soft cap after the mask", cap="after mask"),
    "soft cap before the scale": attention("soft cap before the scale", cap="before scale"),
    "no scale": attention("missing scale", scale="none"),
    "scale twice": attention("scale applied twice", scale="twice"),
    "finite mask before the scale": attention("mask before scale", finite_mask=True),
    "heads modulo": attention("wrong head mapping", heads="modulo"),
    "value heads modulo": attention("head mapping for values", value_heads="modulo"),
    "key-value head 0 for all": attention("wrong head mapping", heads="first"),
    "group of 2 taken for granted": attention(group=2),
    "table ignored": attention("block table ignored", pages="logical"),
    "blocks sorted": attention("unordered blocks", pages="sorted"),
    "blocks reversed": attention("unordered blocks", pages="reversed"),
    "first sequence's table": attention("first sequence's block table", first_row=True),
    "block size 16 taken for granted": attention(block_size=16),
    "last partial block dropped": attention(
        "last partial block dropped", in_last_block, drops_partial=True
    ),
    "rows past the end": attention("past the sequence's end", past_end, whole_block=True),
    "table past its end": attention("table read past its end", past_end, past_table=True),
    "no running maximum": attention("without the running maximum", no_maximum=True),
    "sums not rescaled": attention(sums_not_rescaled=True),
    "mass not rescaled": attention(mass_not_rescaled=True),
    "one maximum for all heads": attention(shared_maximum=True),
    "not divided": attention("not divided by its sum", divisor="none"),
    "divided by the length": attention("divided by the length", divisor="length"),
    "heads before slots": attention("cache layout", hnd=True),
    "keys for values": attention("keys and values exchanged", swapped=True),
    "oldest token left out": attention("oldest token is left out", drops_first=True),
    "32-bit slots": attention("32-bit slot arithmetic", quick=False, int32=True),
    "race from a missing barrier": attention("race", race=True),
    "stale keys of a freed block": attention("stale keys", stale_keys=True),
    "last dims of a head not multiplied": attention(tail=64),
    "dims past 128 not multiplied": attention(max_dim=128),
    "last dims of a value not written": attention(
        where=lambda p, f: f.dim >= p.arguments["query"].shape[2] // 32 * 32, value_tail=32
    ),
    "empty sequence not written": attention("", skips_empty=True),
    "chunks of one length": attention(equal_chunks=True),
    "context past 512 not read": attention(quick=False, max_context=512),
    "queries past 64 not computed": attention(quick=False, max_queries=64),
    "scores in float16": attention(half_scores=True),
    "sums in bfloat16": attention(half_sums=True),
    "one element": attention(
        where=lambda p, f: (
            (f.sequence, f.token, f.head, f.dim)
            == (1, int(p.arguments["query_start_loc"][1]), 2, 11)
        ),
        spoils=(1, 0, 2, 11),
    ),
    "write: padding into the last slot": Mutant(
        "write_kv", {"padding": "last"}, "taken for the last slot", written(last_slot)
    ),
    "write: padding into slot 0": Mutant(
        "write_kv", {"padding": "first"}, "taken for slot 0", written(lambda p: {0})
    ),
    "write: one slot too high": Mutant("write_kv", {"shift": 1}, "one too high"),
    "write: slot 0 skipped": Mutant(
        "write_kv", {"slot_zero": True}, "slot 0 is taken for padding", written(lambda p: {0})
    ),
    "write: last token missing": Mutant(
        "write_kv",
        {"last_token": True},
        "last token is not written",
        lambda p, f: (
            f.token == p.arguments["slot_mapping"].size - 1 or p.case.get("padding", 0) > 0
        ),
    ),
    "write: exchanged": Mutant("write_kv", {"swapped": True}, "exchanged", written(real_slots)),
    "write: no values": Mutant(
        "write_kv",
        {"keys_only": True},
        "values are not written",
        lambda p, f: f.array == "value_cache" and f.slot in real_slots(p),
    ),
    "write: truncated": Mutant(
        "write_kv", {"truncates": True}, "towards zero", written(real_slots), ("bfloat16-cache",)
    ),
    "write: heads before slots": Mutant("write_kv", {"hnd": True}, "cache layout"),
    "write: last dims": Mutant("write_kv", {"tail": 64}, "", dims_from(64)),
    "write: 32-bit slots": Mutant("write_kv", {"int32": True}, "32-bit", quick=False),
    "copy: exchanged": Mutant("copy_blocks", {"exchanged": True}, "exchanged"),
    "copy: all pairs at once": Mutant("copy_blocks", {"at_once": True}, "in order", destination),
    "copy: first layer": Mutant("copy_blocks", {"first_layer": True}, "first layer", destination),
    "copy: last pair": Mutant("copy_blocks", {"last_pair": True}, "last pair", destination),
    "copy: keys only": Mutant("copy_blocks", {"keys_only": True}, "values are not", destination),
    "copy: half a block": Mutant("copy_blocks", {"half_block": True}, "", destination),
    "swap: exchanged": Mutant("swap_blocks", {"exchanged": True}, ""),
    "swap: keys only": Mutant("swap_blocks", {"keys_only": True}, "values are not", destination),
    "swap: last pair": Mutant("swap_blocks", {"last_pair": True}, "last pair", destination),
    "norm: no eps": Mutant("rms_norm", {"no_eps": True}, "eps ignored"),
    "norm: eps outside": Mutant("rms_norm", {"eps_outside": True}, "after the square root"),
    "norm: sum, not mean": Mutant("rms_norm", {"no_mean": True}, "not divided by the width"),
    "norm: no weight": Mutant("rms_norm", {"no_weight": True}, "weight is ignored"),
    "norm: centred": Mutant("rms_norm", {"centred": True}, "layer norm"),
    "norm: 512 columns": Mutant("rms_norm", {"columns": 512}),
    "norm: first row for all": Mutant("rms_norm", {"one_row": True}, "", lambda p, f: f.token > 0),
    "norm: mean in float16": Mutant("rms_norm", {"half": True}),
    "add norm: not stored": Mutant(
        "fused_add_rms_norm", {"not_stored": True}, "", lambda p, f: f.array == "residual"
    ),
    "add norm: normalised before": Mutant("fused_add_rms_norm", {"before": True}, "not added"),
    "rotary: neighbours": Mutant("rotary_embedding", {"neighbours": True}, "neighbours"),
    "rotary: sign": Mutant("rotary_embedding", {"sign": True}, "other way"),
    "rotary: positions ignored": Mutant(
        "rotary_embedding", {"own_positions": True}, "positions ignored"
    ),
    "rotary: off by one": Mutant("rotary_embedding", {"shift": 1}, "positions off by one"),
    "rotary: reads what it wrote": Mutant(
        "rotary_embedding",
        {"stale": True},
        "just written",
        lambda p, f: f.dim >= p.arguments["cos_sin_cache"].shape[1] // 2,
    ),
    "rotary: query only": Mutant(
        "rotary_embedding",
        {"query_only": True},
        "keys are not rotated",
        lambda p, f: f.array == "key",
    ),
    "rotary: pairs over the whole head": Mutant("rotary_embedding", {"whole_head": True}),
    "silu: exchanged": Mutant("silu_and_mul", {"exchanged": True}, "exchanged"),
    "silu: neighbours": Mutant("silu_and_mul", {"neighbours": True}, "neighbours"),
    "silu: overflows": Mutant("silu_and_mul", {"overflows": True}, "overflows"),
    "silu: sigmoid": Mutant("silu_and_mul", {"sigmoid": True}, "sigmoid"),
    "merge: forgets the scale": Mutant(
        "merge_partial_attention", {"average": True}, "forgets the scale"
    ),
    "merge: no maximum": Mutant("merge_partial_attention", {"no_maximum": True}, "maximum"),
    "merge: not divided": Mutant(
        "merge_partial_attention", {"not_divided": True}, "not divided by their sum"
    ),
    "merge: base two": Mutant("merge_partial_attention", {"base_two": True}, "base 2"),
    "merge: empty part leaks": Mutant("merge_partial_attention", {"leaks": True}, "leaks"),
    "merge: no keys": Mutant(
        "merge_partial_attention",
        {"nan_rows": True},
        "without keys",
        lambda p, f: bool((p.arguments["log_sum_exps"][:, f.token, f.head] < -1e30).all()),
    ),
    "top k: one too many": Mutant("top_k_top_p", {"more": 1}, "too many"),
    "top k: first row's": Mutant(
        "top_k_top_p", {"first_row": True}, "first row's", lambda p, f: f.sequence > 0
    ),
    "top p: crossing token dropped": Mutant(
        "top_k_top_p", {"drops_crossing": True}, "crosses top_p"
    ),
    "verify: inverted": Mutant("verify_draft_tokens", {"inverted": True}, "draft / target"),
    "verify: no residual": Mutant("verify_draft_tokens", {"no_residual": True}, "residual"),
    "verify: all accepted": Mutant("verify_draft_tokens", {"accepts_all": True}, "accepted"),
    "verify: no bonus": Mutant("verify_draft_tokens", {"no_bonus": True}, "no token after"),
}
