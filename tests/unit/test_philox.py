"""Random bits are Philox4x32-10's, and a pure function of (key, sample, coordinate): DESIGN D5."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megagpt2.kernels.dropout import dropout, keep_mask, threshold_and_scale
from megagpt2.kernels.philox import key_of, philox, random_bits, random_bits_reference, random_normal

KEY = key_of(1234, "test")
ANY_SAMPLE = st.integers(0, 2**63 - 1)

# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, words.
KNOWN = [
    ([0] * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([0xFFFFFFFF] * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], (0xA4093822, 0x299F31D0),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN, ids=["zeros", "ones", "pi"])
def test_known_answers(counter, key, words):
    result = philox(tuple(torch.tensor([word]) for word in counter), key)
    assert " ".join(f"{word.item():08x}" for word in result) == words


def test_counter_is_coordinate_and_sample():
    """The pi vector through random_bits: its words say where coordinate and sample go."""
    (low, high, sample_low, sample_high), key, words = KNOWN[2]
    element = 4 * (low + ((high & 0x0FFFFFFF) << 32))  # the whole of it would not fit 63 bits as an element
    counter = (low, high & 0x0FFFFFFF, sample_low, sample_high)
    expected = [int(word) for word in philox(tuple(torch.tensor([word]) for word in counter), key)]
    sample = torch.tensor([sample_low + (sample_high << 32)])
    assert random_bits(key, sample, element, 4)[0].tolist() == expected


@given(st.integers(0, 2**40), st.integers(0, 300), st.integers(0, 300), st.lists(ANY_SAMPLE, min_size=1, max_size=3))
def test_bits_of_a_slice_are_the_slice_of_the_bits(start, skip, count, samples):
    samples = torch.tensor(samples)
    whole = random_bits(KEY, samples, start, skip + count)
    assert torch.equal(random_bits(KEY, samples, start + skip, count), whole[:, skip:])
    for row, sample in zip(whole, samples, strict=True):  # nor does a sample depend on the rest of its batch
        assert torch.equal(random_bits(KEY, sample[None], start, skip + count)[0], row)


def test_bits_do_not_depend_on_the_chunks(monkeypatch):
    whole = random_bits_reference(KEY, torch.tensor([3, 4]), 5, 1000)
    monkeypatch.setattr("megagpt2.kernels.philox._CHUNK", 7)
    assert torch.equal(random_bits_reference(KEY, torch.tensor([3, 4]), 5, 1000), whole)


def test_samples_keys_and_places_have_bits_of_their_own():
    """1024 words of 32 bits: two equal streams share all, independent ones 1024**2 / 2**32 = 0.0002 of them."""
    streams = [random_bits(KEY, torch.tensor([sample]), 0, 1024)[0] for sample in (0, 1, 2**32, 2**32 + 1)]
    keys = [key_of(1234, "dropout", layer, site) for layer in (0, 1, 11) for site in ("embedding", "attention")]
    keys += [key_of(1235, "dropout", 0, "embedding"), key_of(1234, "dropout", 1, 1), key_of(1234, "dropout", 11)]
    streams += [random_bits(key, torch.tensor([0]), 0, 1024)[0] for key in keys]
    streams += [random_bits(KEY, torch.tensor([0]), start, 1024)[0] for start in (1024, 2**34)]
    everything = torch.cat(streams)
    assert len(everything.unique()) >= len(everything) - 3  # the birthday bound gives 0.03 on average


def test_keep_rate_and_independence_are_binomial():
    """Each count below is binomial: within 5 standard deviations, which 1 in 2 million independent ones leaves."""
    n, probability = 1 << 20, 0.1
    keep = keep_mask(KEY, probability, torch.tensor([0, 1]), 0, n)

    def within(count: int, rate: float, n: int = n) -> bool:
        return abs(count - n * rate) <= 5 * math.sqrt(n * rate * (1 - rate))

    both = (1 - probability) ** 2
    assert within(keep[0].sum().item(), 1 - probability)
    assert within(keep[1].sum().item(), 1 - probability)
    assert within((keep[0] & keep[1]).sum().item(), both)  # two samples
    assert within((keep[0] & keep[0].roll(1)).sum().item(), both)  # two neighbours: halves of one word, or two words
    assert within((keep[0, ::2] & keep[0, 1::2]).sum().item(), both, n // 2)  # halves of one word
    assert within((keep[0] & keep[0].roll(8)).sum().item(), both)  # two counters


def test_two_elements_share_a_word_and_the_mean_is_kept():
    samples = torch.tensor([3, 2**40])
    words = random_bits(KEY, samples, 2**33, 20)
    for probability in (0.0, 1e-5, 0.1, 0.5, 0.99, 0.999999):
        threshold, scale = threshold_and_scale(probability)
        assert abs(threshold / 2**16 - probability) <= 2**-17 or threshold == 2**16 - 1
        assert (1 - threshold / 2**16) * scale == 1
        expected = torch.stack((words % 2**16 >= threshold, words // 2**16 >= threshold), dim=-1).flatten(1)
        for skip in range(5):
            assert torch.equal(keep_mask(KEY, probability, samples, 2**34 + skip, 34), expected[:, skip : skip + 34])


@given(st.integers(0, 2**40), st.integers(0, 100), st.integers(0, 100))
def test_normal_numbers_of_a_slice_are_the_slice_of_them(start, skip, count):
    whole = random_normal(KEY, start, skip + count)
    assert torch.equal(random_normal(KEY, start + skip, count), whole[skip:])


def test_normal_moments():
    """Sampling deviations of n normals' first four moments: sqrt of 1, 2, 15, 96 over n; 5 of them are allowed."""
    n = 1 << 20
    x = random_normal(KEY, 0, n).double()
    for power, (moment, variance) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96)], 1):
        assert abs((x**power).mean().item() - moment) <= 5 * math.sqrt(variance / n), power
    pairs = x.view(-1, 2)  # Box and Muller's pairs share a radius: they must be uncorrelated all the same
    assert abs((pairs[:, 0] * pairs[:, 1]).mean().item()) <= 5 / math.sqrt(n / 2)
    assert x.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_and_its_gradient_are_the_mask_times_the_scale(dtype):
    samples, probability, start = torch.tensor([7, 9]), 0.25, 13
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    weight = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(2)).to(dtype)
    y = dropout(x, samples, KEY, probability, start)
    (gradient,) = torch.autograd.grad(y, x, weight)
    keep = keep_mask(KEY, probability, samples, start, 40).view(2, 5, 8)
    scale = torch.where(keep, 1.0 / (1.0 - probability), 0.0)
    # One product each, rounded once to the input's type: exact.
    torch.testing.assert_close(y, (x.float() * scale).to(dtype), rtol=0, atol=0)
    torch.testing.assert_close(gradient, (weight.float() * scale).to(dtype), rtol=0, atol=0)


@given(st.integers(0, 40), st.integers(1, 20))
def test_dropout_of_a_piece_is_the_piece_of_the_dropout(first, count):
    x = torch.ones(2, 64)
    whole = dropout(x, torch.tensor([3, 5]), KEY, 0.5)
    piece = dropout(x[:, first : first + count], torch.tensor([3, 5]), KEY, 0.5, start=first)
    assert torch.equal(piece, whole[:, first : first + count])
