"""What every kernel module promises: its twin's signature, and errors that say what to do."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import numpy as np
import pytest
from cuda_arrays import SIMULATED, Problem, on_device

from refengine.cuda import checks, launch, paged_attention, write_kv

MODULES = ("write_kv", "paged_attention", "blocks", "rms_norm", "rotary", "activation")
MODULES += ("merge_partial_attention",)


@pytest.mark.parametrize("name", MODULES)
def test_every_kernel_has_a_twin_of_the_same_signature(name: str) -> None:
    ours = importlib.import_module(f"refengine.cuda.{name}")
    twin = importlib.import_module(f"refengine.reference.{name}")
    functions = [
        function
        for label, function in vars(ours).items()
        if inspect.isfunction(function)
        and function.__module__ == ours.__name__
        and not label.startswith(("_", "run_"))
    ]
    assert functions
    for function in functions:
        other = getattr(twin, function.__name__)
        ours_takes = [
            (p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()
        ]
        twin_takes = [
            (p.name, p.kind, p.default) for p in inspect.signature(other).parameters.values()
        ]
        assert ours_takes == twin_takes


ARGUMENTS = ("query", "key_cache", "value_cache", "block_tables", "seq_lens", "query_start_loc")


@pytest.mark.parametrize(
    ("argument", "change", "message"),
    [
        ("query", lambda x: x[:, :3], "query: got 3 heads; wanted a multiple"),
        ("query", lambda x: x[:, :, :32], "query: got shape"),
        ("query", lambda x: x[..., 0], "query: got shape"),
        ("key_cache", lambda x: x[:, ::2], "key_cache: got strides"),
        ("value_cache", lambda x: x[:, :, :1], "value_cache: got shape"),
        ("seq_lens", lambda x: x[:0], "block_tables: got shape"),
        ("block_tables", lambda x: x[0], "block_tables: got shape"),
        ("query_start_loc", lambda x: x[:1], "query_start_loc: got shape"),
    ],
)
def test_what_does_not_fit_is_named(argument: str, change: Any, message: str) -> None:
    arguments = Problem([5, 9], [1, 2]).arguments()
    i = ARGUMENTS.index(argument)
    arguments[i] = change(arguments[i])
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        paged_attention.paged_attention(*arguments)


def test_mixed_dtypes_are_refused() -> None:
    arguments = Problem([5], [1]).arguments()
    arguments[0] = Problem([5], [1], dtype="float16").arguments()[0]
    with pytest.raises(ValueError, match="mixed dtypes: got query float16, key_cache bfloat16"):
        paged_attention.paged_attention(*arguments)


@pytest.mark.parametrize(("index", "value"), [(7, 0), (8, -1.0), (8, 0.0)])
def test_options_out_of_range_are_refused(index: int, value: float) -> None:
    arguments = Problem([5], [1]).arguments()
    arguments[index] = value
    with pytest.raises(ValueError, match=f"got {value}; wanted"):
        paged_attention.paged_attention(*arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.tables.__setitem__((0, 0), 99), r"block_tables\[0, 0\]: got 99; wanted"),
        (lambda p: p.seq_lens.__setitem__(0, 99), r"seq_lens\[0\]: got 99; wanted 0 to 16"),
        (lambda p: p.starts.__setitem__(1, 8), "query_start_loc: got 8 new tokens"),
    ],
)
def test_debug_mode_reads_the_tables(
    monkeypatch: pytest.MonkeyPatch, change: Any, message: str
) -> None:
    monkeypatch.setattr(checks, "DEBUG", True)
    problem = Problem([5], [1])
    problem.query = np.zeros((8, 4, 64), problem.query.dtype)
    change(problem)
    with pytest.raises(ValueError, match=message):
        paged_attention.paged_attention(*problem.arguments())


def test_debug_mode_reads_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "DEBUG", True)
    row, cache = np.zeros((1, 2, 8), np.float32), np.zeros((2, 4, 2, 8), np.float32)
    slots = on_device(np.array([8]))
    arrays = [on_device(a.copy()) for a in (row, row, cache, cache)]
    with pytest.raises(ValueError, match=r"slot_mapping: got values 8\.\.8; wanted -1\.\.7"):
        write_kv.write_kv(*arrays, slots)


@pytest.mark.skipif(SIMULATED, reason="the simulator takes host arrays")
@pytest.mark.gpu
def test_a_host_tensor_is_refused() -> None:
    arguments = Problem([5], [1]).arguments()
    arguments[1] = arguments[1].cpu()
    with pytest.raises(ValueError, match="key_cache: got Tensor on cpu; wanted a CUDA tensor"):
        paged_attention.paged_attention(*arguments)


def test_scratch_memory_grows_and_starts_at_zero() -> None:
    from refengine.cuda import ptx

    scratch = launch.Scratch(ptx.POINTER_U32)
    first = scratch.get(10)
    assert scratch.get(20) is first
    assert scratch.get(100_000) is not first
