"""What a case becomes: arrays to call a kernel with, and what is known about the right answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from refengine.conformance.case import Case
from refengine.conformance.precision import Array, Float64


@dataclass
class Problem:
    """Arguments of one call, in the contract's order.

    Args:
        case: what it was built from.
        arguments: NumPy arrays, numbers or None by the contract's names.
        outputs: names of the arrays that the kernel writes.
        gaps: elements between the rows of an array whose first axis is to be strided.
        sparse: blocks that matter, for caches too large to be compared whole.
        facts: whatever else its kernel's description wants to remember.
    """

    case: Case
    arguments: dict[str, Any]
    outputs: tuple[str, ...]
    gaps: Mapping[str, int] = field(default_factory=dict)
    sparse: Array | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Expected:
    """The right contents of one output.

    Args:
        exact: in float64 (or the very values, where ``unit`` is None).
        unit: what one unit of error is, element by element; None asks for the same bits.
        free: elements that may be anything (undecided by rounding), or None.
    """

    exact: Array
    unit: Float64 | None = None
    free: Array | None = None


@dataclass(frozen=True)
class Location:
    """Where an element lies; what does not apply is None."""

    sequence: int | None = None
    token: int | None = None
    position: int | None = None
    head: int | None = None
    dim: int | None = None
    block: int | None = None
    slot: int | None = None
    array: str | None = None


@dataclass(frozen=True)
class Mistake:
    """A known mistake: what it would have written, and how to say so."""

    hint: str
    compute: Callable[[Problem], dict[str, Array]]


class KernelSpec(Protocol):
    """All that the suite knows about one kernel of the contract."""

    @property
    def name(self) -> str:
        """The contract's name."""

    @property
    def arguments(self) -> tuple[str, ...]:
        """The contract's arguments, in order."""

    def build(self, case: Case, variation: int = 0) -> Problem:
        """Make the arrays; another ``variation`` has the same shapes and other contents."""

    def expected(self, problem: Problem) -> dict[str, Expected]:
        """The right contents of every output, and the error budget."""

    def locate(
        self, problem: Problem, output: str, index: tuple[int, ...], got: Array, expected: Expected
    ) -> Location:
        """Say in the user's terms where an element of an output lies."""

    def mistakes(self, problem: Problem) -> list[Mistake]:
        """Known mistakes that could show on this problem."""

    def smaller(self, values: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Values of smaller cases, the boldest step first."""

    def traffic(self, problem: Problem) -> tuple[int, int]:
        """Bytes that must move, and floating-point operations."""
