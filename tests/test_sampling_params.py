import pytest

from refengine import SamplingParams


def test_defaults_are_vllms():
    params = SamplingParams()
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (1.0, 1.0, 0, 16)
    assert not params.greedy


def test_one_stop_text_may_stand_alone():
    assert SamplingParams(stop="\n").stop == ("\n",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1}, "temperature must be a number at least 0, got -1"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p must be a number above 0 and at most 1, got 0"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k must be an integer of at least -1, got -2"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"max_tokens": 0}, "max_tokens must be an integer of at least 1, got 0"),
        ({"max_tokens": True}, "max_tokens"),
        ({"min_tokens": 20}, "min_tokens is 20, more than max_tokens, 16"),
        ({"logprobs": 21}, "logprobs must be an integer of at least 0 and at most 20, got 21"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"seed": 1.5}, "seed"),
        ({"stop": [""]}, "stop must hold texts"),
        ({"bad_words": [3]}, "bad_words must hold texts"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"logit_bias": {-1: 0.0}}, "logit_bias"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias"),
    ],
)
def test_bad_values_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**fields)
