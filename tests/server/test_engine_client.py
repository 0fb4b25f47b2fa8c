"""EngineServer and EngineClient over a pipe, with a runner that computes nothing."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from multiprocessing import Pipe

import pytest

from refengine.engine import Engine
from refengine.sampling_params import SamplingParams
from refengine.scheduling.scheduler import Scheduler, SchedulerConfig
from refengine.server.engine_client import (
    EngineClient,
    EngineUnavailableError,
    TooManyRequestsError,
)
from refengine.server.engine_server import EngineServer
from refengine.server.messages import AddRequest, EngineInfo, Ready
from refengine.step import RequestStepOutput, StepOutput

INFO = EngineInfo(1, "none", "none", 100, 1, 64, 64, 4, 8, {})


class CountingRunner:
    """Gives token 7, for ever; step number ``fails_at`` raises."""

    num_kv_blocks = 64

    def __init__(self, fails_at):
        self.steps, self.fails_at = 0, fails_at
        self.dropped = []

    def execute(self, batch):
        self.steps += 1
        self.dropped += batch.dropped_request_ids
        if self.steps == self.fails_at:
            raise ValueError("injected")
        time.sleep(0.002)
        return StepOutput(
            tuple(
                RequestStepOutput(r.request_id, (7,) if r.samples else ()) for r in batch.requests
            )
        )

    def close(self):
        pass


class ThreadSource:
    """Runs an EngineServer on a thread."""

    def __init__(self, fails_at=0):
        self.fails_at = fails_at
        self.runners = []

    def start(self):
        ours, theirs = Pipe()
        runner = CountingRunner(self.fails_at if not self.runners else 0)
        self.runners.append(runner)
        scheduler = Scheduler(SchedulerConfig(num_blocks=64, block_size=4, max_model_len=64))
        server = EngineServer(Engine(scheduler, runner, vocab_size=100), theirs)

        def run():
            theirs.send(Ready(INFO))
            with suppress(ValueError):  # the injected one
                server.run()
            theirs.close()

        threading.Thread(target=run, daemon=True).start()
        return ours

    def end(self, timeout):
        pass


class Sink:
    def __init__(self):
        self.deltas, self.ended = [], threading.Event()

    def __call__(self, delta):
        self.deltas.append(delta)
        if delta.finish_reason or delta.error:
            self.ended.set()


def start(fails_at=0, **keywords):
    source = ThreadSource(fails_at)
    client = EngineClient(source, **keywords)
    client.start()
    wait(lambda: client.state == "ready")
    return client, source


def wait(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def request(name, **params):
    return AddRequest(name, (1, 2, 3), SamplingParams(**({"max_tokens": 5} | params)), stream=True)


def test_deltas_reach_their_sinks_and_statistics_come_with_the_end():
    client, _ = start()
    sinks = [Sink(), Sink()]
    client.submit([(request("a"), sinks[0]), (request("b", max_tokens=3), sinks[1])], limit=2)
    for sink, count in zip(sinks, (5, 3), strict=True):
        assert sink.ended.wait(10)
        assert sum(len(delta.token_ids) for delta in sink.deltas) == count
        assert sink.deltas[-1].finish_reason == "length"
    wait(lambda: client.statistics.num_requests_running == 0)
    statistics = client.statistics
    assert (statistics.generation_tokens, statistics.prompt_tokens) == (8, 6)
    assert statistics.request_success["length"] == 2
    assert sum(statistics.histograms["inter_token_latency_seconds"].counts) == 6
    client.stop()


def test_an_abort_frees_the_blocks_and_ends_the_deltas():
    client, source = start()
    sink = Sink()
    client.submit([(request("a", max_tokens=50), sink)], limit=1)
    wait(lambda: sink.deltas)
    client.abort(["a", "never"])
    wait(lambda: "a" in source.runners[0].dropped)
    count = len(sink.deltas)
    wait(lambda: client.statistics.request_success["abort"] == 1)
    assert client.statistics.kv_cache_usage_perc == 0.0
    assert len(sink.deltas) == count < 50
    client.stop()


def test_what_the_engine_refuses_is_a_400_and_harms_nobody():
    client, _ = start()
    bad, good = Sink(), Sink()
    client.submit([(request("a", stop_token_ids=[100]), bad), (request("b"), good)], limit=9)
    assert good.ended.wait(10)
    ((status, message),) = [delta.error for delta in bad.deltas]
    assert status == 400
    assert "stop_token_ids holds 100" in message
    client.stop()


def test_no_more_than_the_limit():
    client, _ = start()
    client.submit([(request("a", max_tokens=50), Sink())], limit=1)
    with pytest.raises(TooManyRequestsError, match="1 requests are in flight and 1 may be"):
        client.submit([(request("b"), Sink())], limit=1)
    client.stop()


@pytest.mark.parametrize("restart", [False, True])
def test_an_exception_in_a_step_reaches_everyone_who_waits(restart):
    died = threading.Event()
    client, source = start(fails_at=4, restart=restart, on_death=died.set)
    sinks = [Sink(), Sink()]
    pairs = [(request(f"r{i}", max_tokens=40), sink) for i, sink in enumerate(sinks)]
    client.submit(pairs, limit=9)
    for sink in sinks:
        assert sink.ended.wait(10)
        status, message = sink.deltas[-1].error
        assert status == 503
        assert "the engine has died: ValueError: injected" in message
    assert client.num_in_flight == 0
    if restart:
        wait(lambda: client.state == "ready")
        sink = Sink()
        client.submit([(request("again"), sink)], limit=9)
        assert sink.ended.wait(10)
        assert sink.deltas[-1].finish_reason == "length"
        assert len(source.runners) == 2
        client.stop()
    else:
        assert died.wait(10)
        assert client.state == "dead"
        with pytest.raises(EngineUnavailableError, match="injected"):
            client.submit([(request("late"), Sink())], limit=9)
