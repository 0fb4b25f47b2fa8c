"""Functions that raise, hang, crash or write where they should not: one clear line, and on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from refengine.cli.check import command

EMPTY = Path(__file__).with_name("no_cases.toml")
FILE = Path(__file__).with_name("faulty_kernels.py")


def check(function: str, *options: str) -> tuple[int, dict, str]:
    result = CliRunner().invoke(
        command, ["paged_attention", "--impl", f"{FILE}:{function}", "--json", *options]
    )
    return result.exit_code, json.loads(result.stdout), result.stderr


@pytest.mark.parametrize(
    ("function", "kind", "says"),
    [
        ("raises", "raised", "raised KeyError: 'no such thing' (faulty_kernels.py, line "),
        ("returns_another_shape", "wrong shape", "returned shape [3, 3]; out must have shape [1, "),
        ("returns_text", "not an array", "returned 'done' (str); wanted an array"),
        ("does_nothing", "wrote nothing", "returned None and wrote nothing into out"),
        ("writes_after_the_end", "wrote outside", "bytes outside out, right after its last"),
        ("writes_before_the_start", "wrote outside", "outside out, 8 bytes before its first"),
        ("changes_its_query", "changed input", "elements of its input query"),
        ("changes_the_cache", "changed input", "elements of its input key_cache"),
    ],
)
def test_one_line_for_each(function: str, kind: str, says: str) -> None:
    status, report, _ = check(function)
    assert status == 1
    first = report["failures"][0]
    assert first["kind"] == kind
    assert says in first["message"]
    assert "\n" not in first["message"]
    assert report["cases"] > 20  # the run went on
    assert {"case", "error_ratio", "sequence", "token", "head", "dim", "block", "slot", "hint"} <= (
        set(first)
    )


def test_a_hang_is_stopped_and_the_run_goes_on() -> None:
    status, report, _ = check("hangs_on_empty_sequences", "--time-limit", "1")
    assert status == 1
    assert {f["kind"] for f in report["failures"]} == {"hung"}
    assert {f["case"].split("/")[0] for f in report["failures"]} == {
        "empty-sequences",
        "queries-without-tokens",
    }
    assert report["failures"][0]["message"] == "did not return within 1 s; stopped"


def test_a_function_that_always_hangs_is_given_up() -> None:
    status, report, _ = check("always_hangs", "--time-limit", "0.3")
    assert status == 1
    assert [f["kind"] for f in report["failures"][:4]] == ["hung"] * 3 + ["not run"]
    assert len(report["failures"]) == report["cases"]


def test_a_crash_is_one_failure() -> None:
    status, report, _ = check("crashes_on_pages_of_one")
    assert status == 1
    assert [f["case"] for f in report["failures"]] == ["page-size-block_size=1/float32"]
    assert report["failures"][0]["message"] == "crashed (SIGSEGV, signal 11)"


def test_an_exit_is_one_failure_and_prints_do_not_reach_the_report() -> None:
    status, report, _ = check("exits")
    assert status == 1
    assert [f["message"] for f in report["failures"]] == ["ended its process (exit status 3)"]


@pytest.mark.parametrize("function", ["returns_the_result", "another_order_of_names"])
def test_other_ways_to_be_right(function: str) -> None:
    status, report, _ = check(function)
    assert (status, report["failures"], report["passed"]) == (0, [], True)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["no_such_kernel"], "kernel must be one of paged_attention"),
        (["rms_norm", "--impl", "no_such_module:f"], "no_such_module cannot be imported"),
        (["rms_norm", "--impl", f"{FILE}:nothing_here"], "has no 'nothing_here'"),
        (["rms_norm", "--impl", f"{FILE}:not_a_function"], "is a int, not a function"),
        (["rms_norm", "--impl", "nocolon"], "must be written module:function"),
        (["--impl", f"{FILE}:raises"], "name the kernel"),
        (["rms_norm", "--impl", f"{FILE}:raises", "--device", "cuda"], "NumPy arrays are on"),
        (["rms_norm", "--impl", f"{FILE}:raises", "--dtype", "float8"], "dtype must be one of"),
        (["rms_norm", "--impl", f"{FILE}:raises", "--cases", "x.toml"], "quick, full or a TOML"),
        (["rms_norm", "--impl", f"{FILE}:raises", "--where", "width"], "KEY=VALUE"),
        (["top_k_top_p", "--impl", f"{FILE}:raises", "--cases", str(EMPTY)], "no case of top_k"),
        (["rms_norm", "--impl", f"{FILE}:raises", "--without", "tag"], "--without takes one of"),
        (["rms_norm", "--impl", f"{FILE}:raises", "--adapter", "x"], "adapter must be one of"),
        (["rms_norm", "--impl", f"{FILE}:raises", "--layout", "HND"], "layout HND is for"),
    ],
)
def test_what_cannot_be_run_is_status_2(arguments: list[str], says: str) -> None:
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 2
    assert says in result.stderr
    result = CliRunner().invoke(command, [*arguments, "--json"])
    assert result.exit_code == 2
    report = json.loads(result.stdout)
    assert says in report["error"]
    assert not report["passed"]


def test_the_report_for_a_person() -> None:
    result = CliRunner().invoke(
        command, ["paged_attention", "--impl", f"{FILE}:returns_the_result"]
    )
    assert result.exit_code == 0
    assert result.stdout.startswith("passed: paged_attention")
    result = CliRunner().invoke(command, ["paged_attention", "--impl", f"{FILE}:does_nothing"])
    assert "the same in" in result.stdout


def test_a_file_of_ones_own_cases(tmp_path: Path) -> None:
    cases = tmp_path / "mine.toml"
    cases.write_text(
        '[[paged_attention]]\nname = "mine"\nseq_lens = [5]\nquery_lens = [2]\n'
        "grid = { head_dim = [8, 16] }\n"
    )
    status, report, _ = check("returns_the_result", "--cases", str(cases))
    assert (status, report["cases"]) == (0, 2)
