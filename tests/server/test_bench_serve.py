"""``refengine bench serve`` against a running server."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from refengine.cli.bench import command
from refengine.errors import RefengineError


@pytest.mark.parametrize("load", [["--concurrency", "4"], ["--request-rate", "100"]])
def test_it_reports_what_clients_feel(tiny, load):
    flags = ["serve", "--url", tiny.url, "--num-prompts", "12", "--input-len", "3:9",
             "--output-len", "5", "--json", *load]  # fmt: skip
    done = CliRunner().invoke(command, flags, catch_exceptions=False)
    result = json.loads(done.stdout)
    assert (result["completed"], result["errors"], result["output_tokens"]) == (12, {}, 60)
    for name in ("ttft_ms", "itl_ms", "e2e_ms"):
        assert 0 <= result[name]["p50"] <= result[name]["p99"]
    assert result["ttft_ms"]["mean"] <= result["e2e_ms"]["mean"]


def test_errors_are_counted(tiny):
    flags = ["serve", "--url", tiny.url, "--num-prompts", "3", "--model", "other", "--json"]
    result = json.loads(CliRunner().invoke(command, flags, catch_exceptions=False).stdout)
    assert result["completed"] == 0
    assert "there is no model 'other'" in next(iter(result["errors"]))


def test_no_server_is_one_clear_error():
    with pytest.raises(RefengineError, match=r"no model list at http://127\.0\.0\.1:9"):
        CliRunner().invoke(
            command, ["serve", "--url", "http://127.0.0.1:9"], catch_exceptions=False
        )
