"""Generated requests against /openapi.json: no 5xx, no hang, the engine alive after."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.generation import GenerationMode

ROUTES = 13


@pytest.mark.parametrize(
    "examples", [8, pytest.param(400, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_generated_requests(tiny, examples):
    schema = schemathesis.openapi.from_url(tiny.url + "/openapi.json")
    statuses: dict[int, int] = {}
    found = list(schema.get_all_operations())
    assert len(found) == ROUTES

    for result in found:
        operation = result.ok()
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            strategy = operation.as_strategy(generation_mode=mode)

            @settings(
                max_examples=examples,
                deadline=None,
                database=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            )
            @given(case=strategy)
            def send(case: Any) -> None:
                response = case.call(timeout=30)
                statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
                assert response.status_code < 500, (case.body, response.text)

            try:
                send()
            except (schemathesis.errors.SchemathesisError, Unsatisfiable):
                continue
    assert tiny.get("/health").status_code == 200
    assert sum(statuses.values()) >= examples * ROUTES
    tiny.wait_for(tiny.is_idle, 30)
