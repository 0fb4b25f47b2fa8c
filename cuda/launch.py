"""Compiling kernels and launching them in a few microseconds, with no array ever wrapped.

A Numba launch with torch tensors costs the host some 340 microseconds, most of it inspecting the
arguments. Here a kernel is compiled once to PTX for declared parameter types, loaded by the driver,
and launched with raw addresses through one reused block of arguments. Launches go to the stream set
by ``set_stream``, allocate nothing, and can be captured in a CUDA graph.

In the simulator the same ``Kernel`` objects take NumPy arrays.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import ptx

Array = Any
_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID
_MAX_DYNAMIC_SHARED = 8  # CUfunction_attribute
_MULTIPROCESSOR_COUNT, _COMPUTE_MAJOR, _COMPUTE_MINOR = 16, 75, 76  # CUdevice_attribute

_PACK_GRID = struct.Struct("3I").pack_into  # the head of CUlaunchConfig
_stream = 0


def set_stream(handle: int) -> None:
    """Send later launches to this CUDA stream (``torch.cuda.current_stream().cuda_stream``).

    0 is the default stream, torch's too.
    """
    global _stream  # noqa: PLW0603 (what the kernel set holds, in one place)
    _stream = handle


def stream() -> int:
    """The stream that launches go to now."""
    return _stream


# ---------------------------------------------------------------- the driver


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):
    """``CUlaunchConfig``."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z")),
        *((name, ctypes.c_uint) for name in ("block_x", "block_y", "block_z")),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(code: int, what: str) -> None:
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        reason = text.value.decode() if text.value else f"error {code}"
        raise RuntimeError(f"CUDA driver: {what}: {reason}")


@functools.cache
def _device() -> int:
    """The device of the current context; makes device 0's primary context current if none is."""
    driver = _driver()
    _check(driver.cuInit(0), "cuInit")
    context = ctypes.c_void_p()
    _check(driver.cuCtxGetCurrent(ctypes.byref(context)), "cuCtxGetCurrent")
    if not context.value:
        _check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0), "primary context")
        _check(driver.cuCtxSetCurrent(context), "cuCtxSetCurrent")
    device = ctypes.c_int()
    _check(driver.cuCtxGetDevice(ctypes.byref(device)), "cuCtxGetDevice")
    return device.value


def _attribute(number: int) -> int:
    value, device = ctypes.c_int(), _device()
    code = _driver().cuDeviceGetAttribute(ctypes.byref(value), number, device)
    _check(code, "cuDeviceGetAttribute")
    return value.value


@functools.cache
def num_multiprocessors() -> int:
    """How many multiprocessors the device has (2 in the simulator)."""
    return 2 if ptx.SIMULATED else _attribute(_MULTIPROCESSOR_COUNT)


@functools.cache
def compute_capability() -> tuple[int, int]:
    """The device's compute capability; the simulator stands for (9, 0)."""
    if ptx.SIMULATED:
        return (9, 0)
    return _attribute(_COMPUTE_MAJOR), _attribute(_COMPUTE_MINOR)


# ---------------------------------------------------------------- arguments


def address(array: Array, kind: Any = None) -> Any:
    """What a kernel takes for an array: its address; in the simulator a flat view as ``kind``."""
    if not ptx.SIMULATED:
        return array.data_ptr()
    span = 1 + sum(
        (n - 1) * s // array.itemsize for n, s in zip(array.shape, array.strides, strict=True)
    )
    if array.size == 0:
        flat = np.empty(0, array.dtype)
    else:
        flat = np.lib.stride_tricks.as_strided(array, (span,), (array.itemsize,))
    return flat if kind is None else flat.view(kind.dtype)


@functools.lru_cache(maxsize=1024)
def bits(x: float) -> Any:
    """A float32 kernel argument: its bits, which is how the launch block holds it."""
    if ptx.SIMULATED:
        return np.float32(x)
    return struct.unpack("<I", struct.pack("<f", x))[0]


class Scratch:
    """Device memory that kernels use between themselves, zero at first.

    It grows when a call wants more than any before it. What it gave before stays allocated,
    because a captured graph may hold its address; a call that is captured must therefore have run
    once before (as graph captures warm up anyway), since nothing may be allocated meanwhile.
    """

    def __init__(self, kind: Any) -> None:
        self._kind = kind
        self._held: list[Any] = []
        self._size = 0

    def get(self, num_words: int) -> Any:
        """At least ``num_words`` 32-bit words."""
        if num_words > self._size:
            size = max(num_words, 2 * self._size, 1024)
            if ptx.SIMULATED:
                self._held.append(np.zeros(size, self._kind.dtype))
            else:
                pointer, driver = ctypes.c_uint64(), _driver()
                _device()
                code = driver.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(4 * size))
                _check(code, f"allocating {4 * size} bytes of scratch memory")
                code = driver.cuMemsetD32_v2(pointer, 0, ctypes.c_size_t(size))
                _check(code, "clearing scratch memory")
                self._held.append(pointer.value)
            self._size = size
        return self._held[-1]


# ---------------------------------------------------------------- tensor maps

_BFLOAT16, _FLOAT16 = 9, 6  # CUtensorMapDataType
_SWIZZLE_128B, _PROMOTE_256B = 3, 3
BOX_DIMS = 64  # 128 bytes: as wide as the swizzle


class _TensorMaps:
    """Descriptions of caches for the copy engine, kept on the device."""

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}
        self._free: list[int] = []

    def get(self, cache: Array, dtype: str, box_slots: int) -> Any:
        """Where the map of ``cache`` lies; boxes are 64 dims of one head of ``box_slots`` slots.

        It is made when a cache is first seen, so the first call may not be captured in a graph.
        """
        if ptx.SIMULATED:
            return ptx.TensorMap(cache, box_slots)
        key = (cache.data_ptr(), tuple(cache.shape), dtype, box_slots)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._make(*key)
        return found

    def _make(self, address: int, shape: tuple[int, ...], dtype: str, box_slots: int) -> int:
        driver = _driver()
        _device()
        if not self._free:
            pool = ctypes.c_uint64()
            _check(driver.cuMemAlloc_v2(ctypes.byref(pool), 64 * 128), "allocating tensor maps")
            self._free = [pool.value + 128 * i for i in range(64)]
        num_blocks, block_size, num_heads, head_dim = shape
        memory = ctypes.create_string_buffer(192)
        encoded = ctypes.addressof(memory) + -ctypes.addressof(memory) % 64
        sizes = (ctypes.c_uint64 * 3)(head_dim, num_heads, num_blocks * block_size)
        steps = (ctypes.c_uint64 * 2)(2 * head_dim, 2 * head_dim * num_heads)
        box = (ctypes.c_uint32 * 3)(BOX_DIMS, 1, box_slots)
        ones = (ctypes.c_uint32 * 3)(1, 1, 1)
        code = driver.cuTensorMapEncodeTiled(
            ctypes.c_void_p(encoded),
            _BFLOAT16 if dtype == "bfloat16" else _FLOAT16,
            3,
            ctypes.c_void_p(address),
            sizes,
            steps,
            box,
            ones,
            0,
            _SWIZZLE_128B,
            _PROMOTE_256B,
            0,
        )
        _check(code, f"describing a cache of shape {list(shape)} to the copy engine")
        place = self._free.pop()
        code = driver.cuMemcpyHtoD_v2(
            ctypes.c_uint64(place), ctypes.c_void_p(encoded), ctypes.c_size_t(128)
        )
        _check(code, "copying a tensor map")
        return place


tensor_maps = _TensorMaps()

# ---------------------------------------------------------------- kernels


class Kernel:
    """One kernel: source, parameter types and launch shape; compiled when first launched.

    Args:
        function: The kernel's source, a plain Python function.
        parameters: Its parameter types, of ``ptx`` (``POINTER_U32``, ``U32``, ``F32`` ...).
        threads: Threads of a block.
        blocks_per_sm: How many blocks should fit a multiprocessor: bounds the registers.
        shared_bytes: Dynamic shared memory of a block.
        fastmath: Let the compiler fuse and approximate (off where bits must agree).
        hopper: Uses instructions of sm_90a alone.
    """

    def __init__(
        self,
        function: Callable[..., None],
        parameters: Sequence[Any],
        *,
        threads: int,
        blocks_per_sm: int = 1,
        shared_bytes: int = 0,
        fastmath: bool = True,
        hopper: bool = False,
    ) -> None:
        self.function, self.parameters = function, tuple(parameters)
        self.threads, self.blocks_per_sm = threads, blocks_per_sm
        self.shared_bytes, self.fastmath, self.hopper = shared_bytes, fastmath, hopper
        self._handle: ctypes.c_void_p | None = None
        # The launch block: a slot of 8 bytes an argument, and where each slot is.
        count = len(self.parameters)
        self._pack = struct.Struct(f"{count}q").pack_into
        self._values = ctypes.create_string_buffer(8 * count)
        first = ctypes.addressof(self._values)
        self._slots = (ctypes.c_void_p * count)(*(first + 8 * i for i in range(count)))
        # The kernel may be set up while the one before it drains; it waits before it reads.
        self._overlap = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0)
        self._overlap.value[0] = 1
        self._config = _Config(block_x=threads, block_y=1, block_z=1, shared_bytes=shared_bytes)

    def ptx(self, capability: tuple[int, int]) -> str:
        """Compile for a compute capability; needs no GPU."""
        from numba import cuda

        target = (*capability, "a") if self.hopper else capability
        text, _ = cuda.compile(
            self.function,
            ptx.VOID(*self.parameters),  # type: ignore[misc]
            device=False,
            abi="numba",
            cc=target,
            fastmath=self.fastmath,
            launch_bounds=(self.threads, self.blocks_per_sm),
        )
        if capability < (9, 0):  # kernels overlap from Hopper on; before, this waits by itself
            for name in ("wait", "launch_dependents"):
                text = text.replace(f"griddepcontrol.{name};", "")
        return str(text)

    def load(self) -> None:
        """Compile for the current device and load; a launch does this when it is the first."""
        driver, capability = _driver(), compute_capability()
        text = self.ptx(capability)
        name = text.split(".entry", 1)[1].split("(", 1)[0].strip()
        module, handle = ctypes.c_void_p(), ctypes.c_void_p()
        code = driver.cuModuleLoadData(ctypes.byref(module), text.encode())
        _check(code, f"loading kernel {self.function.__qualname__}")
        code = driver.cuModuleGetFunction(ctypes.byref(handle), module, name.encode())
        _check(code, f"finding kernel {name}")
        if self.shared_bytes > 48 * 1024:
            code = driver.cuFuncSetAttribute(handle, _MAX_DYNAMIC_SHARED, self.shared_bytes)
            _check(code, f"asking for {self.shared_bytes} bytes of shared memory")
        if capability >= (9, 0) and "griddepcontrol.wait" in text:
            self._config.attributes = ctypes.pointer(self._overlap)
            self._config.num_attributes = 1
        self._handle = handle

    def __call__(self, grid: tuple[int, int, int], *arguments: Any) -> None:
        """Launch on the current stream; arguments as ``address``, ``bits`` and integers."""
        if ptx.SIMULATED:
            from .simulator import launch

            launch(self.function, grid, self.threads, self.shared_bytes, arguments)
            return
        if self._handle is None:
            self.load()
        self._pack(self._values, 0, *arguments)
        config = self._config
        _PACK_GRID(config, 0, *grid)
        config.stream = _stream
        code = _launch(config, self._handle, self._slots, None)
        if code:
            _check(code, f"launching {self.function.__qualname__} with grid {grid}")


def _first_launch(*arguments: Any) -> int:
    """``cuLaunchKernelEx``; replaces itself by the driver's function when first called."""
    global _launch  # noqa: PLW0603
    function = _driver().cuLaunchKernelEx
    function.argtypes = (
        ctypes.POINTER(_Config),
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_void_p,
    )
    _launch = function
    return int(function(*arguments))


_launch: Callable[..., int] = _first_launch
