"""``refengine check``: is a kernel right, and if not, where is it wrong?"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from typing import Any

import click

from refengine.cli.options import show_progress
from refengine.errors import RefengineError

NOT_RUNNABLE = 2
EPILOG = """
\b
Examples:
  refengine check
  refengine check paged_attention --impl my_kernels:attention
  refengine check paged_attention --impl my_kernels:attention --cases full --dtype bfloat16 \\
      --backend-of-arrays torch --device cuda --where head_dim=64,128 --without soft_cap
  refengine check rms_norm --impl my_kernels.py:rms_norm --time

\b
Exit status: 0 passed, 1 failed, 2 not runnable. docs/kernel_suite.md is the guide.
"""


@click.command("check", epilog=EPILOG)
@click.argument("kernel", required=False)
@click.option(
    "--impl",
    metavar="MODULE:FUNCTION",
    help="What to check; a file.py:function will do. [default: all of our own]",
)
@click.option(
    "--backend",
    type=click.Choice(["reference", "cpu", "cuda"]),
    help="Of our own kernels, only this backend's.",
)
@click.option(
    "--backend-of-arrays",
    "kind",
    type=click.Choice(["numpy", "torch", "cupy"]),
    default="numpy",
    show_default=True,
    help="Whose arrays the function takes.",
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option(
    "--cases",
    default=None,
    metavar="quick|full|FILE",
    help="What to pose. [default: quick; with --simulate a few small ones]",
)
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    metavar="DTYPE",
    help="float32, float16, bfloat16, float16-cache, bfloat16-cache (a 16-bit cache under float32 "
    "activations); repeat for several. [default: float32; with torch or cupy also bfloat16]",
)
@click.option("--adapter", metavar="NAME", help="Signature: vllm, flash_attn or flashinfer.")
@click.option(
    "--layout",
    type=click.Choice(["NHD", "HND"]),
    default="NHD",
    show_default=True,
    help="Of the cache: slots before heads, or heads before slots.",
)
@click.option(
    "--without", multiple=True, metavar="TAG", help="Leave out cases with a tag, as soft_cap."
)
@click.option(
    "--where", multiple=True, metavar="KEY=V,V", help="Only these values, as head_dim=64,128."
)
@click.option(
    "--time-limit",
    type=click.FloatRange(min=0.01),
    default=None,
    help="Seconds that a case may take. [default: 10, and 30 more for a dtype's first case]",
)
@click.option(
    "--simulate",
    is_flag=True,
    help="Run Numba-CUDA kernels in the simulator, on a few small cases: no GPU needed.",
)
@click.option("--time", "timed", is_flag=True, help="Also measure speed against this machine's.")
@click.option(
    "--count-accesses",
    "counted",
    is_flag=True,
    help="Count a Numba-CUDA kernel's memory accesses and their coalescing; implies --simulate.",
)
@click.option("--list", "listed", is_flag=True, help="Only list the cases.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def command(ctx: click.Context, /, kernel: str | None, as_json: bool, **flags: Any) -> None:
    """Check KERNEL of the contract (paged_attention, write_kv, rms_norm, ...).

    The verdict is an error budget: the kernel's error against float64, as a multiple of the error
    that the same mathematics costs when it is done densely in that precision.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        reports = list(_reports(kernel, as_json, **flags))
    except RefengineError as error:
        if as_json:
            click.echo(json.dumps({"kernel": kernel, "passed": False, "cases": 0, "failures": [],
                                   "error": str(error)}))  # fmt: skip
        raise _NotRunnableError(str(error)) from error
    if flags["listed"]:
        return
    from refengine.conformance.report import combined

    if as_json:
        click.echo(json.dumps(combined(reports, kernel or "all")))
    ctx.exit(0 if reports and all(report.passed for report in reports) else 1)


class _NotRunnableError(click.ClickException):
    exit_code = NOT_RUNNABLE


def _reports(
    kernel: str | None,
    as_json: bool,
    *,
    impl: str | None,
    backend: str | None,
    kind: str,
    device: str,
    cases: str | None,
    dtypes: tuple[str, ...],
    adapter: str | None,
    layout: str,
    without: tuple[str, ...],
    where: tuple[str, ...],
    time_limit: float | None,
    simulate: bool,
    timed: bool,
    counted: bool,
    listed: bool,
) -> Iterable[Any]:
    """Run every check that was asked for, and say each verdict as soon as it is there."""
    from refengine.conformance.accesses import SIMULATOR, count_implementation
    from refengine.conformance.check import check_kernel, default_dtypes
    from refengine.conformance.implementation import Implementation
    from refengine.conformance.kernels import find_kernel
    from refengine.conformance.own import own_implementations

    keep = _parse_where(where)
    simulate = simulate or counted
    cases = cases or ("simulator" if simulate else "quick")
    if simulate and impl is None and backend is None:
        backend = "cuda"
    environment = SIMULATOR if simulate else {}
    if simulate and time_limit is None:
        time_limit = 300.0
    _check_tags(without)
    if kernel is not None:
        find_kernel(kernel)
    todo: list[tuple[Implementation, tuple[str, ...]]] = []
    if impl is not None:
        if kernel is None:
            raise RefengineError("name the kernel that --impl implements, as paged_attention")
        mine = Implementation(kernel, impl, None, kind, device, adapter, layout)
        todo = [(mine, dtypes or default_dtypes(kind))]
    else:
        for own in own_implementations(kernel, backend, simulated=simulate):
            chosen = tuple(d for d in dtypes if d in own.dtypes) if dtypes else own.dtypes
            if chosen:
                todo.append((own.implementation, chosen))
        if not todo:
            raise RefengineError("we have no such kernel here; name one with --impl")
    if listed:
        _list_cases(kernel, todo, cases, without, keep)
        return
    for implementation, chosen in todo:
        report = check_kernel(
            implementation.kernel,
            implementation,
            cases=cases,
            dtypes=chosen,
            without=without,
            where=keep,
            time_limit=time_limit,
            environment=environment,
            progress=_bar(implementation.kernel),
        )
        if not as_json:
            _print_report(report)
        if timed:
            from refengine.conformance.timing import time_implementation

            report.timings = time_implementation(implementation, chosen, time_limit)
            if not as_json:
                _print_table("speed", report.timings)
        if counted:
            report.accesses = count_implementation(implementation, chosen, time_limit)
            if not as_json:
                _print_table("memory accesses of the simulated kernel", report.accesses)
        yield report


def _bar(kernel: str) -> Any:
    from tqdm import tqdm

    return lambda cases: tqdm(cases, desc=kernel, leave=False, disable=not show_progress())


def _parse_where(where: tuple[str, ...]) -> dict[str, list[Any]]:
    """``head_dim=64,128`` as a dictionary; numbers become numbers."""
    out: dict[str, list[Any]] = {}
    for text in where:
        key, equals, values = text.partition("=")
        if not equals or not values:
            raise RefengineError(f"--where must be written KEY=VALUE,VALUE, got {text!r}")
        out[key] = [_number(value) for value in values.split(",")]
    return out


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _check_tags(without: tuple[str, ...]) -> None:
    from refengine.conformance.case import all_tags

    tags = all_tags()
    for tag in without:
        if tag not in tags:
            raise RefengineError(f"--without takes one of {', '.join(sorted(tags))}, got {tag!r}")


def _list_cases(
    kernel: str | None, todo: list[Any], cases: str, without: tuple[str, ...], where: Any
) -> None:
    from refengine.conformance.case import load_cases

    for name in dict.fromkeys(implementation.kernel for implementation, _ in todo):
        for case in load_cases(name, cases, without=without, where=where):
            tags = f"  [{', '.join(case.tags)}]" if case.tags else ""
            prefix = "" if kernel else f"{name} "
            click.echo(f"{prefix}{click.style(case.name, bold=True)}  {case.describe()}{tags}")


def _print_report(report: Any) -> None:
    """A report with its verdict coloured on a terminal."""
    first, _, rest = report.text().partition("\n")
    colour = "green" if report.passed else "red"
    verdict, colon, what = first.partition(":")
    click.echo(click.style(verdict, fg=colour, bold=True) + colon + what)
    if rest:
        click.echo(rest)
    if not report.passed:
        click.echo()


def _print_table(title: str, rows: list[dict[str, Any]]) -> None:
    """Rows of one shape, aligned."""
    click.echo(f"    {title}:")
    if not rows:
        click.echo("      nothing to measure")
        return
    names = list(rows[0])
    cells = [names, *([_cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    for line in cells:
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        click.echo("      " + text.rstrip())


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
