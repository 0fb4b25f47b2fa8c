import numpy as np
import pytest

from refengine.execution.sampler import Sampler, SamplingInput, top_logprobs
from refengine.sampling_params import SamplingParams

VOCAB = 50
NONE = np.array([], np.int32)


def row(params=None, seed=0, prompt=NONE, output=NONE, bad_words=()):
    return SamplingInput(
        params or SamplingParams(),
        seed,
        np.array(prompt, np.int32),
        np.array(output, np.int32),
        bad_words,
    )


def logits_of(*likeliest):
    """Logits in which the named tokens come first, in this order."""
    logits = np.zeros(VOCAB, np.float32)
    for rank, token in enumerate(likeliest):
        logits[token] = 10 - rank
    return logits


def choose(logits, request, **kwargs):
    return Sampler(**kwargs).sample(logits[None], [request])[0].token_id


def greedy(**fields):
    return SamplingParams(temperature=0, **fields)


def test_greedy_takes_the_largest():
    assert choose(logits_of(7, 3), row(greedy())) == 7


def test_tokens_depend_on_the_own_seed_and_position_alone():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((3, VOCAB)).astype(np.float32)
    requests = [row(seed=5), row(seed=6, output=[1]), row(seed=5, output=[1, 2])]
    together = [token.token_id for token in Sampler().sample(logits, requests)]
    alone = [choose(logits[i], requests[i]) for i in range(3)]
    reversed_ = [t.token_id for t in Sampler().sample(logits[::-1].copy(), requests[::-1])]
    assert together == alone == reversed_[::-1]


def test_different_seeds_give_different_tokens():
    logits = np.zeros(VOCAB, np.float32)
    assert len({choose(logits, row(seed=s)) for s in range(40)}) > 10


def test_temperature_near_zero_is_greedy_without_overflow():
    logits = logits_of(9) * np.float32(1e4)
    with np.errstate(all="raise", under="ignore"):
        assert choose(logits, row(SamplingParams(temperature=1e-30), seed=3)) == 9


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"logit_bias": {7: -100}}, 3),
        ({"logit_bias": {20: 90}}, 20),
        ({"repetition_penalty": 1.5}, 3),
        ({"presence_penalty": 2.0}, 3),
        ({"frequency_penalty": 1.5}, 3),
        ({"min_tokens": 2}, 3),  # 7 is the end of sequence
        ({}, 7),
    ],
)
def test_each_option_moves_the_choice(fields, expected):
    request = row(greedy(**fields), output=[7])
    assert choose(logits_of(7, 3), request, eos_token_ids=(7,)) == expected


def test_min_tokens_also_forbids_stop_tokens_and_ends_in_time():
    params = greedy(min_tokens=2, stop_token_ids=[7])
    assert choose(logits_of(7, 3), row(params, output=[1])) == 3
    assert choose(logits_of(7, 3), row(params, output=[1, 1])) == 7


def test_bad_words_end_where_they_would_be_completed():
    words = ((4, 7),)
    assert choose(logits_of(7, 3), row(greedy(), output=[4], bad_words=words)) == 3
    assert choose(logits_of(7, 3), row(greedy(), output=[5], bad_words=words)) == 7
    assert choose(logits_of(7, 3), row(greedy(), prompt=[4], bad_words=words)) == 3


@pytest.mark.parametrize("fields", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_filters_down_to_one_token_are_greedy(fields):
    request = row(SamplingParams(temperature=2.0, **fields), seed=1)
    assert choose(logits_of(7, 3), request) == 7


def test_logprobs_are_of_the_raw_distribution():
    logits = logits_of(7, 3, 5)
    params = SamplingParams(temperature=0, logit_bias={7: -100}, logprobs=2)
    token = Sampler().sample(logits[None], [row(params)])[0]
    assert token.token_id == 3
    exact = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    assert list(token.logprobs) == [3, 7]
    assert token.logprobs[3].rank == 2
    assert token.logprobs[7].rank == 1
    assert token.logprobs[7].logprob == pytest.approx(exact[7], abs=1e-5)


def test_zero_logprobs_report_the_chosen_token_alone():
    assert list(top_logprobs(logits_of(7, 3), 20, 0)) == [20]


def test_the_chosen_token_comes_with_the_likeliest():
    entries = top_logprobs(logits_of(7, 3, 5, 6), 20, 3)
    assert list(entries) == [20, 7, 3, 5]
    assert entries[20].rank == 5


def test_greedy_rows_leave_the_logits_alone():
    logits = np.stack([logits_of(7), logits_of(3)])
    before = logits.copy()
    params = SamplingParams(
        repetition_penalty=2.0, logit_bias={1: 5.0}, min_tokens=3, stop_token_ids=[2]
    )
    Sampler().sample(logits, [row(params, output=[7]), row(greedy())])
    np.testing.assert_array_equal(logits, before)
