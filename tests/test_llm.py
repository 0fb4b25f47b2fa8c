import pytest

from refengine import LLM, SamplingParams
from refengine.errors import RefengineError, RequestError

GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def llm(tiny_model):
    return LLM(str(tiny_model("llama3_scaling")), backend="reference", num_kv_blocks=64)


def idle(llm):
    scheduler = llm.engine.scheduler
    return not llm._outputs and scheduler.num_free_blocks == scheduler.num_blocks


def test_one_prompt_or_many_in_order(llm):
    one = llm.generate("the cat", GREEDY)
    many = llm.generate(["on a", {"prompt": "the cat"}, {"prompt_token_ids": [5, 6]}], GREEDY)
    assert len(one) == 1
    assert [output.prompt for output in many] == ["on a", "the cat", None]
    assert many[1].outputs == one[0].outputs
    assert many[2].prompt_token_ids == (5, 6)
    assert idle(llm)


def test_params_for_each_prompt(llm):
    params = [SamplingParams(temperature=0, max_tokens=n) for n in (1, 4)]
    outputs = llm.generate(["the", "the"], params)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 4]
    with pytest.raises(RequestError, match="2 entries for 1 prompts"):
        llm.generate("the", params)


def test_a_refused_prompt_leaves_nothing_behind(llm):
    with pytest.raises(RequestError, match="the prompt is empty"):
        llm.generate(["the", ""], GREEDY)
    with pytest.raises(RequestError, match="a prompt must be a text"):
        llm.generate([3], GREEDY)
    assert idle(llm)


def test_ctrl_c_leaves_nothing_behind(llm, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(llm.engine.runner, "execute", lambda batch: interrupted())
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["the", "cat"], GREEDY)
    monkeypatch.undo()
    assert not llm._outputs
    assert not llm.engine.has_unfinished_requests()


def test_stream_pieces_join_to_the_text(llm):
    whole = llm.generate("the cat", GREEDY)[0].outputs[0]
    pieces = list(llm.stream("the cat", GREEDY))
    assert "".join(piece.outputs[0].text for piece in pieces) == whole.text
    assert tuple(t for piece in pieces for t in piece.outputs[0].token_ids) == whole.token_ids
    assert [piece.finished for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert idle(llm)


def test_streams_and_calls_may_interleave(llm):
    expected = llm.generate(["the cat", "on a", "the"], GREEDY)
    first, second = llm.stream("the cat", GREEDY), llm.stream("on a", GREEDY)
    texts = [next(first).outputs[0].text, next(second).outputs[0].text]
    middle = llm.generate("the", GREEDY)
    texts[0] += "".join(piece.outputs[0].text for piece in first)
    texts[1] += "".join(piece.outputs[0].text for piece in second)
    assert [*texts, middle[0].outputs[0].text] == [e.outputs[0].text for e in expected]
    assert idle(llm)


def test_closing_a_stream_aborts_it(llm):
    stream = llm.stream("the cat", SamplingParams(max_tokens=300))
    next(stream)
    assert llm.engine.has_unfinished_requests()
    stream.close()
    assert not llm.engine.has_unfinished_requests()


def test_chat_renders_the_template(llm):
    messages = [{"role": "user", "content": "the cat"}]
    one = llm.chat(messages, GREEDY)
    both = llm.chat([messages, messages], GREEDY)
    assert one[0].prompt == "<s><|user|>the cat\n<|assistant|>"
    assert [output.outputs for output in both] == [one[0].outputs] * 2
    other = llm.chat(messages, GREEDY, chat_template="{{ messages[0]['content'] }}!")
    assert other[0].prompt == "the cat!"
    with pytest.raises(RequestError, match="messages is empty"):
        llm.chat([], GREEDY)


def test_prompt_logprobs_survive_chunks_and_preemption(tiny_model, llm):
    prompt = {"prompt_token_ids": list(range(3, 40))}
    params = SamplingParams(temperature=0, max_tokens=40, prompt_logprobs=2, logprobs=1)
    whole = llm.generate(prompt, params)[0]
    assert whole.prompt_logprobs[0] is None
    assert len(whole.prompt_logprobs) == 37
    for token, entry in zip(range(4, 40), whole.prompt_logprobs[1:], strict=True):
        assert token in entry
    small = LLM(
        str(tiny_model("llama3_scaling")), backend="reference", num_kv_blocks=6,
        max_num_batched_tokens=5,
    )  # fmt: skip
    outputs = small.generate([prompt] * 3, params)
    assert sum(output.num_preemptions for output in outputs) > 0
    for output in outputs:
        assert output.outputs[0].token_ids == whole.outputs[0].token_ids
        assert len(output.outputs[0].logprobs) == 40
        for ours, theirs in zip(output.prompt_logprobs[1:], whole.prompt_logprobs[1:], strict=True):
            assert ours.keys() == theirs.keys()
            for token, value in ours.items():
                assert value.logprob == pytest.approx(theirs[token].logprob, abs=1e-4)


def test_unknown_options_are_named():
    with pytest.raises(ValueError, match="no option 'speed'"):
        LLM("smollm2", speed=9)
    with pytest.raises(ValueError, match="backend must be one of"):
        LLM("smollm2", backend="tpu")
    with pytest.raises(RefengineError, match="no model"):
        LLM("/no/such/model")
