"""Which tokens can be drawn, how often, and that the same seed draws the same."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from megagpt2.generation.sampling import Sampling, filtered_probabilities, generate

VOCABULARY = 12
# Distances of at least 1/8 keep probabilities apart, where a test needs one order of the tokens.
DISTINCT = st.permutations(range(VOCABULARY)).map(lambda order: torch.tensor(order) / 8.0)
LOGITS = st.lists(st.floats(-5, 5, width=16), min_size=VOCABULARY, max_size=VOCABULARY).map(torch.tensor)


def probabilities(logits: torch.Tensor, **settings) -> torch.Tensor:
    return filtered_probabilities(logits[None], Sampling(**settings))[0]


@given(LOGITS)
def test_temperature_0_takes_the_likeliest(logits):
    expected = torch.zeros(VOCABULARY)
    expected[logits.argmax()] = 1.0
    assert torch.equal(probabilities(logits, temperature=0), expected)
    assert torch.equal(probabilities(logits, temperature=0, top_k=3, top_p=0.1), expected)


@given(LOGITS, st.floats(0.1, 5))
def test_temperature_divides_the_logits(logits, temperature):
    expected = (logits.double() / temperature).softmax(0)  # fp32 softmax: some 1e-7 relative to logits up to 50
    torch.testing.assert_close(probabilities(logits, temperature=temperature).double(), expected, rtol=1e-5, atol=1e-9)


@given(DISTINCT, st.integers(1, VOCABULARY + 3))
def test_top_k_keeps_the_k_likeliest_in_proportion(logits, k):
    kept = probabilities(logits, top_k=k)
    best = logits.argsort(descending=True)[:k]
    expected = torch.zeros(VOCABULARY)
    expected[best] = logits[best].softmax(0)
    torch.testing.assert_close(kept, expected, rtol=1e-5, atol=0)  # fp32 softmax; zeros are exactly 0


@given(st.lists(st.integers(0, 2), min_size=VOCABULARY, max_size=VOCABULARY), st.integers(1, VOCABULARY))
def test_top_k_keeps_exactly_k_among_equals(logits, k):
    """bf16 logits often are equal: k = 1 must still be one token."""
    logits = torch.tensor(logits).bfloat16()
    kept = probabilities(logits, top_k=k) > 0
    assert kept.sum() == k
    assert k == VOCABULARY or logits[kept].min() >= logits[~kept].max()


@given(DISTINCT, st.floats(0.01, 0.999))
def test_top_p_keeps_the_smallest_set_of_that_mass(logits, p):
    """Brute force over the sizes: of all sets of n tokens the n likeliest have the greatest mass."""
    whole = logits.double().softmax(0)
    ordered = whole.sort(descending=True)
    masses = [ordered.values[:n].sum().item() for n in range(VOCABULARY + 1)]
    assume(min(abs(mass - p) for mass in masses) > 1e-5)  # else fp32 can't tell on which side of p a mass is
    size = next(n for n, mass in enumerate(masses) if mass >= p)
    expected = torch.zeros(VOCABULARY, dtype=torch.float64)
    best = ordered.indices[:size]
    expected[best] = whole[best] / masses[size]
    torch.testing.assert_close(probabilities(logits, top_p=p).double(), expected, rtol=1e-5, atol=0)


@given(LOGITS, st.floats(0.1, 3), st.integers(0, VOCABULARY), st.floats(0.01, 1))
def test_what_is_drawn_from_is_a_distribution(logits, temperature, k, p):
    both = torch.stack([logits, -logits])
    result = filtered_probabilities(both, Sampling(temperature, k, p))
    torch.testing.assert_close(result.sum(1), torch.ones(2), rtol=1e-5, atol=0)  # 12 fp32 roundings
    assert (result >= 0).all()
    assert torch.equal(both.gather(1, result.argmax(1, keepdim=True))[:, 0], both.amax(1))  # the likeliest always stays
    alone = probabilities(logits, temperature=temperature, top_k=k, top_p=p)
    torch.testing.assert_close(result[0], alone)  # no row looks at another


def constant(logits: torch.Tensor):
    """A model that always says the same."""
    return lambda tokens: logits.expand(len(tokens), -1)


def test_draws_follow_the_distribution():
    """Chi-square of 20,000 draws in 12 classes: above 33.1 with probability 5e-4 (11 degrees of freedom)."""
    logits = torch.linspace(-2, 1, VOCABULARY)
    drawn = generate(constant(logits), torch.zeros(2000, 1, dtype=torch.int64), 10, 4, Sampling(), seed=3)[:, 1:]
    counts = torch.bincount(drawn.flatten(), minlength=VOCABULARY).double()
    expected = logits.double().softmax(0) * drawn.numel()
    assert ((counts - expected) ** 2 / expected).sum() < 33.1


def test_what_is_filtered_is_never_drawn():
    logits = torch.linspace(-1, 1, VOCABULARY)
    drawn = generate(
        constant(logits), torch.zeros(500, 1, dtype=torch.int64), 10, 4, Sampling(top_k=5, top_p=0.6), seed=0
    )[:, 1:]
    allowed = filtered_probabilities(logits[None], Sampling(top_k=5, top_p=0.6))[0].nonzero().flatten()
    assert sorted(drawn.unique().tolist()) == allowed.tolist()  # and each of them is, at 5,000 draws


def test_same_seed_same_text():
    prompt, model = torch.zeros(2, 3, dtype=torch.int64), constant(torch.zeros(50))
    first, again, other = (generate(model, prompt, 40, 8, Sampling(), seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)  # 80 draws of 50
    assert not torch.equal(first[0], first[1])  # nor do the rows share their draws


def test_the_prompt_stays_and_the_model_sees_the_last_tokens():
    """A model that names how far it sees, and the oldest token of it."""
    seen = []

    def model(tokens):
        seen.append(tokens.clone())
        logits = torch.zeros(len(tokens), 100)
        logits[torch.arange(len(tokens)), (tokens[:, -1] + 1) % 100] = 1.0
        return logits

    prompt = torch.tensor([[3, 4, 5], [50, 60, 70]])
    out = generate(model, prompt, 5, 4, Sampling(temperature=0), seed=0)
    assert out.tolist() == [[3, 4, 5, 6, 7, 8, 9, 10], [50, 60, 70, 71, 72, 73, 74, 75]]
    assert [view.shape[1] for view in seen] == [3, 4, 4, 4, 4]
    assert all(torch.equal(view, out[:, : length + 3][:, -4:]) for length, view in enumerate(seen))


def test_stop_ends_rows_one_by_one_and_then_all():
    stop = 9

    def model(tokens):  # counts down from the last token; 0 stops, and what follows a stop would be 5
        logits = torch.zeros(len(tokens), 10)
        following = torch.where(tokens[:, -1] == 0, stop, (tokens[:, -1] - 1) % 10)
        following = torch.where(tokens[:, -1] == stop, 5, following)
        logits[torch.arange(len(tokens)), following] = 1.0
        return logits

    prompt = torch.tensor([[1], [3]])
    out = generate(model, prompt, 50, 8, Sampling(temperature=0), seed=0, stop=stop)
    assert out.tolist() == [[1, 0, 9, 9, 9], [3, 2, 1, 0, 9]]
    assert generate(model, prompt, 3, 8, Sampling(temperature=0), seed=0).tolist() == [[1, 0, 9, 5], [3, 2, 1, 0]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.5}, "temperature -0.5"),
        ({"temperature": math.nan}, "temperature nan"),
        ({"temperature": math.inf}, "temperature inf"),
        ({"top_k": -1}, "top_k -1"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.5}, "top_p 1.5"),
        ({"top_p": math.nan}, "top_p nan"),
    ],
)
def test_illegal_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)
