"""The kernel suite behind ``refengine check``: is a kernel right, and if not, where is it wrong?

    from refengine.conformance import check_kernel
    report = check_kernel("paged_attention", my_function, cases="quick")
    assert report.passed, report.text()

docs/kernel_suite.md is the guide. Nothing is loaded before it is used: the pytest plugin imports
this package in every run of an environment that has it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refengine.conformance.check import check_kernel
    from refengine.conformance.report import Failure, Report

__all__ = ["Failure", "Report", "check_kernel"]

_HOMES = {"check_kernel": "check", "Failure": "report", "Report": "report"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
