"""A test file for kernels that have none: see ``refengine.conformance.plugin``."""

from __future__ import annotations

from refengine.conformance.plugin import KernelCase


def test_kernel(refengine_case: KernelCase) -> None:
    """One case of ``--refengine-kernel`` on ``--refengine-impl``."""
    refengine_case.check()
