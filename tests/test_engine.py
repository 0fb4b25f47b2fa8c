"""The engine with a runner that computes nothing: token n of a request is a function of n."""

import pytest

from refengine.engine import Engine
from refengine.errors import RequestError
from refengine.sampling_params import SamplingParams
from refengine.scheduling.scheduler import Scheduler, SchedulerConfig
from refengine.step import Logprob, RequestStepOutput, StepOutput

VOCAB = 100
EOS = 99


class ScriptedRunner:
    """Gives each request the tokens of its script, one a step, by how many it has."""

    num_kv_blocks = 64

    def __init__(self, scripts, logprobs=False):
        self.scripts = scripts
        self.logprobs = logprobs
        self.known = {}
        self.batches = []
        self.closed = False

    def execute(self, batch):
        self.batches.append(batch)
        for request_id in batch.dropped_request_ids:
            self.known.pop(request_id, None)
        for new in batch.new_requests:
            self.known[new.request_id] = new.num_prompt_tokens
        outputs = []
        for part in batch.requests:
            tokens = ()
            if part.samples:
                position = part.start + part.num_tokens - self.known[part.request_id]
                tokens = (self.scripts[part.request_id][position],)
            entry = tuple({t: Logprob(-0.5, 1)} for t in tokens) if self.logprobs else None
            outputs.append(RequestStepOutput(part.request_id, tokens, entry))
        return StepOutput(tuple(outputs), {"forward": 0.001})

    def close(self):
        self.closed = True


class LetterTokenizer:
    """Token 0 is "a", 1 is "b", ...; stop texts are cut as the real one cuts them."""

    vocab_size = VOCAB

    def encode(self, text):
        return [ord(c) - ord("a") for c in text]

    def bad_words_token_ids(self, bad_words):
        return tuple(tuple(self.encode(word)) for word in bad_words)

    def detokenizer(self, params, prompt_token_ids):
        return LetterDetokenizer(params.stop)


class LetterDetokenizer:
    def __init__(self, stop):
        self.stop, self.text, self.stop_reason = stop, "", None

    def append(self, token_ids):
        before = len(self.text)
        self.text += "".join(chr(ord("a") + t) for t in token_ids)
        for stop in self.stop:
            if stop in self.text:
                self.text, self.stop_reason = self.text[: self.text.index(stop)], stop
        return self.text[before:]

    def finish(self):
        return ""


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1.0
        return self.now


def make(scripts, *, tokenizer=True, logprobs=False, observers=(), **config):
    defaults = {"num_blocks": 64, "block_size": 4, "max_model_len": 64}
    clock = Clock()
    runner = ScriptedRunner(scripts, logprobs)
    engine = Engine(
        Scheduler(SchedulerConfig(**(defaults | config)), clock=clock),
        runner,
        vocab_size=VOCAB,
        tokenizer=LetterTokenizer() if tokenizer else None,
        eos_token_ids=(EOS,),
        clock=clock,
        observers=observers,
    )
    return engine, runner


def run(engine):
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
        engine.scheduler.check_invariants()
    return outputs


def test_one_output_at_the_end_unless_streamed():
    engine, _ = make({"r": range(50)})
    engine.add_request("r", "xyz", SamplingParams(max_tokens=5))
    (output,) = run(engine)
    answer = output.outputs[0]
    assert (answer.text, answer.token_ids) == ("abcde", (0, 1, 2, 3, 4))
    assert (answer.finish_reason, output.finished, output.prompt) == ("length", True, "xyz")


def test_streamed_pieces_join_to_the_whole():
    engine, _ = make({"r": range(50)})
    engine.add_request("r", "xyz", SamplingParams(max_tokens=5), stream=True)
    outputs = run(engine)
    assert [o.outputs[0].text for o in outputs] == list("abcde")
    assert [t for o in outputs for t in o.outputs[0].token_ids] == [0, 1, 2, 3, 4]
    assert [o.outputs[0].finish_reason for o in outputs] == [None] * 4 + ["length"]


def test_end_of_sequence_is_a_token_but_not_a_text():
    engine, _ = make({"r": [1, 2, EOS, 3]})
    engine.add_request("r", "x", SamplingParams(max_tokens=10))
    (output,) = run(engine)
    answer = output.outputs[0]
    assert (answer.text, answer.token_ids, answer.finish_reason) == ("bc", (1, 2, EOS), "stop")


def test_a_stop_text_across_tokens_ends_the_request():
    engine, runner = make({"r": range(50)})
    engine.add_request("r", "x", SamplingParams(max_tokens=30, stop="de"))
    (output,) = run(engine)
    answer = output.outputs[0]
    assert (answer.text, answer.finish_reason, answer.stop_reason) == ("abc", "stop", "de")
    assert answer.token_ids == (0, 1, 2, 3, 4)
    assert len(runner.batches) == 5
    assert engine.scheduler.num_free_blocks == engine.scheduler.num_blocks


def test_a_stop_text_in_the_last_allowed_token_counts_as_stop():
    engine, _ = make({"r": range(50)})
    engine.add_request("r", "x", SamplingParams(max_tokens=3, stop="bc"))
    (output,) = run(engine)
    assert (output.outputs[0].text, output.outputs[0].finish_reason) == ("a", "stop")


def test_abort_gives_what_there_is_and_frees_everything():
    engine, _ = make({"r": range(50), "s": range(50)})
    engine.add_request("r", "x", SamplingParams(max_tokens=30))
    engine.add_request("s", "x", SamplingParams(max_tokens=2))
    engine.step()
    output = engine.abort_request("r")
    assert (output.outputs[0].finish_reason, output.outputs[0].token_ids) == ("abort", (0,))
    assert engine.abort_request("r") is None
    (other,) = run(engine)
    assert other.request_id == "s"
    assert engine.scheduler.num_free_blocks == engine.scheduler.num_blocks


def test_requests_without_a_seed_draw_from_the_engines():
    seeds = []
    for _ in range(2):
        engine, runner = make({"r": range(9), "s": range(9), "t": range(9)})
        for name in "rs":
            engine.add_request(name, "x", SamplingParams(max_tokens=1))
        engine.add_request("t", "x", SamplingParams(max_tokens=1, seed=5))
        run(engine)
        seeds.append([new.seed for new in runner.batches[0].new_requests])
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == 3
    assert seeds[0][2] == 5


def test_bad_words_reach_the_runner_as_tokens():
    engine, runner = make({"r": range(9)})
    engine.add_request("r", "x", SamplingParams(max_tokens=1, bad_words=["ab"]))
    run(engine)
    assert runner.batches[0].new_requests[0].bad_words_token_ids == ((0, 1),)


def test_times_are_the_clocks():
    engine, _ = make({"r": range(50)})
    request = engine.add_request("r", "xyz", SamplingParams(max_tokens=3))
    (output,) = run(engine)
    times = output.metrics.token_times
    assert len(times) == 3
    assert (
        request.arrival_time < output.metrics.first_scheduled_time < times[0] < times[1] < times[2]
    )
    assert output.metrics.finished_time == times[-1]


def test_logprobs_add_up():
    engine, _ = make({"r": range(50)}, logprobs=True)
    engine.add_request("r", "x", SamplingParams(max_tokens=4, logprobs=0))
    (output,) = run(engine)
    assert len(output.outputs[0].logprobs) == 4
    assert output.outputs[0].cumulative_logprob == -2.0


def test_observers_see_every_step():
    records = []

    class Recorder:
        def on_step(self, record):
            records.append(record)

    engine, runner = make({"r": range(50)}, observers=[Recorder()])
    engine.add_request("r", "xyz", SamplingParams(max_tokens=3))
    run(engine)
    assert [record.batch for record in records] == runner.batches
    assert all(record.num_free_blocks <= record.num_blocks == 64 for record in records)
    assert all(record.started < record.ended for record in records)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ("", {}, "the prompt is empty"),
        ([], {}, "the prompt is empty"),
        ([5, 100], {}, "prompt_token_ids holds 100, outside this model's vocabulary of 100"),
        ([-1], {}, "prompt_token_ids holds -1"),
        ([5], {"logit_bias": {100: 1.0}}, "logit_bias holds 100"),
        ([5], {"stop_token_ids": [3, 100]}, "stop_token_ids holds 100"),
        ([1] * 64, {}, "64"),
        ([1] * 8, {"max_tokens": 56}, "blocks"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(prompt, params, message):
    engine, _ = make({}, num_blocks=8)
    with pytest.raises(RequestError, match=message):
        engine.add_request("r", prompt, SamplingParams(**params))
    assert not engine.has_unfinished_requests()


def test_a_request_id_in_use_is_refused():
    engine, _ = make({"r": range(9)})
    engine.add_request("r", "x")
    with pytest.raises(RequestError, match="'r' is in use"):
        engine.add_request("r", "y")


def test_texts_need_a_tokenizer():
    engine, _ = make({}, tokenizer=False)
    for prompt, params in (("text", {}), ([1], {"stop": "x"}), ([1], {"bad_words": ["x"]})):
        with pytest.raises(RequestError, match="needs a tokenizer"):
            engine.add_request("r", prompt, SamplingParams(**params))
    assert not engine.has_unfinished_requests()


def test_a_step_that_fails_can_be_tried_again():
    engine, runner = make({"r": range(50), "s": range(50)})
    for name in "rs":
        engine.add_request(name, "xyz", SamplingParams(max_tokens=6))
    execute, outputs, count = runner.execute, [], 0

    def sometimes(batch):
        nonlocal count
        count += 1
        if count in (1, 4, 5):
            raise MemoryError("no room")
        return execute(batch)

    runner.execute = sometimes
    while engine.has_unfinished_requests():
        try:
            outputs += engine.step()
        except MemoryError:
            assert engine.scheduler.num_running == 0
        engine.scheduler.check_invariants()
    assert [o.outputs[0].token_ids for o in outputs] == [(0, 1, 2, 3, 4, 5)] * 2
    assert engine.scheduler.num_free_blocks == engine.scheduler.num_blocks


def test_close_closes_the_runner():
    engine, runner = make({})
    engine.close()
    assert runner.closed
