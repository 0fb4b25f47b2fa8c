r"""The pytest plugin: other people's kernels, one test a case.

In a test file of one's own:

    @pytest.mark.refengine_kernel("paged_attention", cases="quick", dtypes=["float32"])
    def test_my_attention(refengine_case):
        refengine_case.check(my_attention)

Or with no file at all:

    pytest --pyargs refengine.conformance.kernel_test \\
        --refengine-kernel paged_attention --refengine-impl my_kernels:attention

This module is imported in every pytest run of an environment that has refengine, so it imports
nothing large until a test asks for it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from refengine.conformance.case import Case
    from refengine.conformance.implementation import Implementation
    from refengine.conformance.runner import Runner

MARKER = "refengine_kernel"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of ``refengine.conformance.kernel_test``."""
    group = parser.getgroup("refengine", "kernels checked by refengine")
    group.addoption("--refengine-kernel", metavar="NAME", help="kernel of the contract")
    group.addoption("--refengine-impl", metavar="MODULE:FUNCTION", help="what implements it")
    group.addoption("--refengine-cases", metavar="quick|full|FILE", default="quick")
    group.addoption("--refengine-dtype", metavar="DTYPE", action="append", default=[])
    group.addoption("--refengine-arrays", metavar="numpy|torch|cupy", default="numpy")
    group.addoption("--refengine-device", metavar="cpu|cuda", default="cpu")
    group.addoption("--refengine-adapter", metavar="NAME", default=None)
    group.addoption("--refengine-layout", metavar="NHD|HND", default="NHD")


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker; let ``--refengine-impl`` name a file of the folder one stands in."""
    if config.getoption("refengine_impl") and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    config.addinivalue_line(
        "markers",
        f"{MARKER}(kernel, cases='quick', dtypes=None, without=(), where=None, kind='numpy', "
        "device='cpu', adapter=None, layout='NHD'): run the test once for each case of a kernel "
        "of refengine's contract; it gets the case as refengine_case",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each case of the marker, or of the command line's options."""
    if "refengine_case" not in metafunc.fixturenames:
        return
    settings = _settings(metafunc)
    if settings is None:
        skip = pytest.mark.skip(reason="--refengine-kernel and --refengine-impl are not given")
        metafunc.parametrize("refengine_case", [pytest.param(None, marks=skip)], indirect=True)
        return
    from refengine.conformance.case import load_cases
    from refengine.conformance.check import default_dtypes
    from refengine.conformance.kernels import find_kernel
    from refengine.errors import RefengineError

    kernel, cases, dtypes, without, where, options = settings
    try:
        find_kernel(kernel)
        found = load_cases(
            kernel,
            cases,
            dtypes=dtypes or default_dtypes(options["kind"]),
            without=without,
            where=where,
        )
    except RefengineError as error:
        raise pytest.UsageError(str(error)) from error
    values = [(case, options) for case in found]
    labels = [case.label for case in found]
    metafunc.parametrize("refengine_case", values, ids=labels, indirect=True)


def _settings(metafunc: pytest.Metafunc) -> Any:
    """Kernel, cases, dtypes, tags to leave out, values to keep, and what the arrays are."""
    config = metafunc.config
    marker = metafunc.definition.get_closest_marker(MARKER)
    if marker is None:
        kernel, target = config.getoption("refengine_kernel"), config.getoption("refengine_impl")
        if not kernel or not target:
            return None
        options = {
            "kind": config.getoption("refengine_arrays"),
            "device": config.getoption("refengine_device"),
            "adapter": config.getoption("refengine_adapter"),
            "layout": config.getoption("refengine_layout"),
            "target": target,
        }
        cases, dtypes = config.getoption("refengine_cases"), config.getoption("refengine_dtype")
        return kernel, cases, dtypes, (), None, options
    if len(marker.args) != 1:
        raise pytest.UsageError(f"@pytest.mark.{MARKER} takes the kernel's name")
    given = {
        "cases": "quick",
        "dtypes": None,
        "without": (),
        "where": None,
        "kind": "numpy",
        "device": "cpu",
        "adapter": None,
        "layout": "NHD",
        **marker.kwargs,
    }
    options = {name: given[name] for name in ("kind", "device", "adapter", "layout")}
    return (
        marker.args[0],
        *(given[name] for name in ("cases", "dtypes", "without", "where")),
        options,
    )


class KernelCase:
    """One case, for one test."""

    def __init__(self, case: Case, options: dict[str, Any], runners: dict[str, Runner]) -> None:
        self.case, self._options, self._runners = case, options, runners

    def check(self, implementation: str | Callable[..., Any] | None = None) -> None:
        """Fail the test unless the implementation passes this case.

        Args:
            implementation: a function, or "module:function", which runs in a process of its own
                with a time limit; None for what ``--refengine-impl`` names.
        """
        __tracebackhide__ = True
        from refengine.conformance.check import check_one
        from refengine.conformance.implementation import Implementation
        from refengine.errors import RefengineError

        options = dict(self._options)
        target = options.pop("target", "")
        function = None
        if isinstance(implementation, str):
            target = implementation
        elif implementation is not None:
            target, function = "", implementation
        found = Implementation(self.case.kernel, target, function, **options)
        try:
            report = check_one(self.case, self._runner(found))
            says = "" if report.passed else report.text()
        except RefengineError as error:
            says = str(error)
        if says:
            pytest.fail(says, pytrace=False)

    def _runner(self, implementation: Implementation) -> Runner:
        from refengine.conformance.runner import make_runner

        key = repr(implementation)
        if key not in self._runners:
            self._runners[key] = make_runner(implementation, None)
        return self._runners[key]


@pytest.fixture(scope="session")
def _refengine_runners() -> Iterator[dict[str, Runner]]:
    """Child processes, kept for the next case."""
    runners: dict[str, Runner] = {}
    yield runners
    for runner in runners.values():
        runner.close()


@pytest.fixture
def refengine_case(
    request: pytest.FixtureRequest, _refengine_runners: dict[str, Runner]
) -> KernelCase:
    """One case of the kernel that the test is marked with; call its ``check``."""
    case, options = request.param
    return KernelCase(case, options, _refengine_runners)
