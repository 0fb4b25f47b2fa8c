import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refengine.reference import sampling

LOGITS = st.lists(st.floats(-30, 30, width=32, allow_nan=False), min_size=2, max_size=600).map(
    lambda values: np.array(values, np.float32)
)


def test_uniform_is_a_pure_function_of_its_arguments():
    assert sampling.uniform(1, 2, 3) == sampling.uniform(1, 2, 3)
    draws = {sampling.uniform(s, p, t) for s in range(10) for p in range(10) for t in range(3)}
    assert len(draws) == 300


def test_uniform_takes_any_integer_as_seed():
    assert sampling.uniform(-1, 0) == sampling.uniform(2**64 - 1, 0)
    assert 0.0 <= sampling.uniform(2**70, 5) < 1.0


@pytest.mark.parametrize("vary", ["seed", "position", "stream"])
def test_uniform_is_flat_along_each_argument(vary):
    count = 20_000
    draws = np.array(
        [
            sampling.uniform(**({"seed": 7, "position": 3, "stream": 0} | {vary: i}))
            for i in range(count)
        ]
    )
    observed, _ = np.histogram(draws, bins=20, range=(0, 1))
    expected = count / 20
    chi_squared = ((observed - expected) ** 2 / expected).sum()
    assert chi_squared < 43.8  # 19 degrees of freedom, p = 0.001
    # Neighbours are not correlated: 1 / sqrt(count) is one standard deviation.
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 4 / np.sqrt(count)


def test_sample_frequencies_are_the_softmax():
    logits = np.array([2.0, 0.0, -np.inf, 1.0, 1.5], np.float32)
    count = 40_000
    draws = [sampling.sample(logits, sampling.uniform(11, i)) for i in range(count)]
    probabilities = np.exp(sampling.log_softmax(logits).astype(np.float64))
    observed = np.bincount(draws, minlength=5)
    assert observed[2] == 0
    kept = probabilities > 0
    chi_squared = (
        (observed - count * probabilities)[kept] ** 2 / (count * probabilities[kept])
    ).sum()
    assert chi_squared < 16.3  # 3 degrees of freedom, p = 0.001


@given(LOGITS, st.floats(0, 1, exclude_max=True))
@settings(deadline=None)
def test_sample_never_takes_a_removed_token(logits, draw):
    logits = np.where(np.arange(logits.size) % 2 == 1, -np.inf, logits).astype(np.float32)
    assert sampling.sample(logits, draw) % 2 == 0


def test_sample_at_the_very_end_of_the_distribution():
    logits = np.array([0.0, 0.0, -np.inf], np.float32)
    assert sampling.sample(logits, np.nextafter(1.0, 0.0)) == 1


@given(LOGITS, st.integers(-1, 700))
@settings(deadline=None)
def test_top_k_keeps_the_likeliest(logits, top_k):
    kept = sampling.apply_top_k_top_p(logits, top_k, 1.0) > -np.inf
    if top_k <= 0 or top_k >= logits.size:
        assert kept.all()
        return
    assert kept.sum() >= top_k  # more only where logits tie
    kth = np.sort(logits)[-top_k]
    assert (kept == (logits >= kth)).all()


@given(LOGITS, st.floats(0.01, 0.999))
@settings(deadline=None)
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits, top_p):
    kept = sampling.apply_top_k_top_p(logits, 0, top_p) > -np.inf
    # Independently: sort everything, likeliest first, lower ids first among equals.
    weights = sampling.softmax_weights(logits)
    order = sorted(range(logits.size), key=lambda i: (-logits[i], i))
    expected, cumulative = set(), 0.0
    for token in order:
        expected.add(token)
        cumulative += weights[token]
        if cumulative >= top_p * weights.sum():
            break
    # The two sums round differently; a set may differ by the token at the border.
    assert len(expected ^ set(np.flatnonzero(kept).tolist())) <= 1
    assert kept[order[0]]


def test_top_p_over_a_flat_vocabulary_larger_than_the_first_guess():
    logits = np.zeros(5000, np.float32)
    kept = np.flatnonzero(sampling.apply_top_k_top_p(logits, 0, 0.5) > -np.inf)
    assert kept.tolist() == list(range(2500))


def test_min_p_is_relative_to_the_likeliest():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    kept = sampling.apply_min_p(logits, 0.25) > -np.inf
    assert kept.tolist() == [True, True, True, False]
    assert sampling.apply_min_p(logits, 0.0) is logits


def test_repetition_penalty_looks_at_prompt_and_output():
    logits = np.array([2.0, -2.0, 4.0, 1.0], np.float32)
    out = sampling.apply_penalties(logits, np.array([0, 1]), np.array([2, 2]), 2.0)
    np.testing.assert_array_equal(out, np.array([1.0, -4.0, 2.0, 1.0], np.float32))


def test_presence_and_frequency_look_at_the_output_alone():
    logits = np.zeros(4, np.float32)
    out = sampling.apply_penalties(
        logits, np.array([0, 0, 0]), np.array([1, 2, 2, 2]),
        presence_penalty=0.5, frequency_penalty=0.25,
    )  # fmt: skip
    np.testing.assert_array_equal(out, np.array([0.0, -0.75, -1.25, 0.0], np.float32))
    assert (logits == 0).all()


def test_bad_words_need_their_whole_beginning():
    words = [(5,), (1, 2, 3), (9, 9)]
    assert sampling.bad_word_token_ids(words, [7, 1, 2]) == [5, 3]
    assert sampling.bad_word_token_ids(words, [2]) == [5]
    assert sampling.bad_word_token_ids(words, []) == [5]
    assert sampling.bad_word_token_ids(words, [9]) == [5, 9]


def test_log_softmax_sums_to_one_even_for_huge_logits():
    logits = np.array([5e5, 5e5 - 1, -5e5], np.float32)
    assert np.exp(sampling.log_softmax(logits).astype(np.float64)).sum() == pytest.approx(
        1, abs=1e-6
    )
