"""How far a layout's training is from plain torch's on one process: the measures of invariants I1 and I2.

error(T) = max|a - b| / max|b| per tensor. fp32: losses, gradient norms and gradients (read from one step of SGD) within
1e-5; weights after 5 steps of Adam (eps 1e-5) within 1e-4. The key third of c_attn.bias has gradient zero in exact
arithmetic (a constant added to all scores of a softmax): there only rounding is left, and Adam turns rounding into
steps of the learning rate, so |difference| <= 2 lr steps is all that holds.

Parts that two ranks hold are compared bit by bit on the way (I5).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from tests.support import plain
from tests.support.train import error, small_config, train, whole

STEPS = 5
SEEDS = (1, 2, 3, 4)  # beside the configuration's
RATE = 1024.0  # of SGD: so large a step that a weight of 1 does not round its gradient of 1e-3 away
SGD = {
    "optimizer.name": "sgd", "optimizer.learning_rate": RATE, "optimizer.clip": 0.0, "optimizer.weight_decay": 0.0,
}


def gradients(parts: list[dict]) -> dict[str, np.ndarray]:
    """One step of SGD moves every weight by RATE times its gradient."""
    before, after = whole(parts, "before"), whole(parts, "after")
    return {name: (before[name] - after[name]) / RATE for name in before}


def without_keys(name: str, tensor: np.ndarray) -> np.ndarray:
    """c_attn.bias without its key third, whose gradient is zero in exact arithmetic; any other tensor as it is."""
    if not name.endswith("attn.c_attn.bias"):
        return tensor
    q, _, v = np.split(tensor, 3)
    return np.concatenate([q, v])


def keys_of(name: str, tensor: np.ndarray) -> np.ndarray:
    """The key third of c_attn.bias; nothing of any other tensor."""
    return np.split(tensor, 3)[1] if name.endswith("attn.c_attn.bias") else tensor[:0]


def tensor_errors(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> dict[str, float]:
    """I1's measure by name."""
    assert found.keys() == expected.keys()
    return {name: error(without_keys(name, found[name]), without_keys(name, expected[name])) for name in expected}


def clipped_length(pool, ranks: int, changes: dict, clip: float) -> float:
    """How long the gradient was that one step of SGD applied, with a clip far below its norm: `clip`, if the norm was
    the true one. (DeepSpeed divides by norm + 1e-6.)"""
    parts = pool.run("tests.support.train:train", ranks, changes={**SGD, "optimizer.clip": clip, **changes}, steps=1)
    return np.sqrt(sum(float((part.astype(np.float64) ** 2).sum()) for part in gradients(parts).values()))


@dataclass(frozen=True)
class Trained:
    """What two short runs of a layout gave: Adam over STEPS steps (`adam`), one step of SGD (`sgd`), by rank."""

    adam: list[dict]
    sgd: list[dict]


@dataclass(frozen=True)
class Errors:
    """Largest errors of a layout against a reference. `keys`: |difference| of key biases after Adam, absolute."""

    loss: float
    norm: float
    gradient: float
    weight: float
    keys: float

    @classmethod
    def of(cls, found: Trained, expected: Trained) -> Errors:
        truth = _reported(expected.adam[0])
        loss = max(error(_reported(part), truth) for part in found.adam)  # every rank must report the right one
        norm = max(_norm_error(part, expected.adam[0]) for part in found.adam)
        here, there = whole(found.adam, "after"), whole(expected.adam, "after")
        keys = max(float(np.abs(keys_of(n, here[n]) - keys_of(n, there[n])).max(initial=0.0)) for n in there)
        gradient = tensor_errors(gradients(found.sgd), gradients(expected.sgd))
        return cls(loss, norm, max(gradient.values()), max(tensor_errors(here, there).values()), keys)


def assert_exact(errors: Errors) -> None:
    """Invariant I1."""
    rate = small_config().optimizer.learning_rate
    limits = {"loss": 1e-5, "norm": 1e-5, "gradient": 1e-5, "weight": 1e-4, "keys": 2 * rate * STEPS}
    over = {name: value for name, value in asdict(errors).items() if not value <= limits[name]}
    assert not over, f"over I1's limits {limits}: {over}"


def assert_rounded_as(found: Trained, exact: Trained, rounded: Trained, floor: float) -> None:
    """Invariant I2: a layout's low precision differs from fp32 (`exact`) by what one process's does (`rounded`).

    Rounding errors of the two are different draws: twice is allowed, and no tensor is held to less than `floor`. A
    step's gradient norm is one number, and after some steps in low precision one process's errors go from 1e-3 to 4e-3
    by seed: what counts is the largest of several seeds (`rounded.adam[0]["norm_error"]`). Weights count together: Adam
    turns a gradient that is nearly zero, and rounded to the other sign, into a whole step of a single element.
    """
    truth = _reported(exact.adam[0])
    rounding = np.abs(_reported(rounded.adam[0]) - truth).max()
    for part in found.adam:
        assert np.abs(_reported(part) - truth).max() <= 2 * rounding + 2e-4
    expected = gradients(exact.sgd)
    one, here = (tensor_errors(gradients(run.sgd), expected) for run in (rounded, found))
    wrong = {name: (here[name], one[name]) for name in one if not here[name] <= max(2 * one[name], floor)}
    norms, plain_norms = _norm_error(found.adam[0], exact.adam[0]), rounded.adam[0]["norm_error"]
    assert norms <= max(2 * plain_norms, floor / 4), f"gradient norms: {norms}, one process {plain_norms}"
    assert not wrong, f"(error, one process's error) of gradients: {wrong}"
    moved, plain_moved = (_distance(whole(run.adam, "after"), whole(exact.adam, "after")) for run in (found, rounded))
    assert moved <= 1.25 * plain_moved, f"weights after {STEPS} steps: {moved} from fp32's, one process {plain_moved}"


def _norm_error(found: dict, expected: dict) -> float:
    """Of the gradient norms of all steps."""
    return error(np.array(found["norms"]), np.array(expected["norms"]))


def _distance(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """Euclidean, over all weights."""
    squares = (np.square(without_keys(n, found[n] - expected[n]), dtype=np.float64).sum() for n in expected)
    return float(np.sqrt(sum(squares)))


def _reported(part: dict) -> np.ndarray:
    return np.array([*part["losses"], part["validation"]])


def train_both(changes: dict) -> tuple[dict, dict]:
    """A job for the pool: Adam and SGD on this rank."""
    return train(changes, STEPS), train({**changes, **SGD}, 1)


def train_plain(changes: dict) -> tuple[dict, dict]:
    """A job for the pool, on one rank: the same in plain torch. In low precision `norm_error` of Adam's run is the
    largest error of a gradient norm against fp32, of this seed and SEEDS."""
    adam, sgd = plain.train(changes, STEPS), plain.train({**changes, **SGD}, 1)
    if changes.get("training.precision", "fp32") == "fp32":
        return adam, sgd
    exact = {**changes, "training.precision": "fp32"}
    errors = [_norm_error(adam, plain.train(exact, STEPS))]
    for seed in ({"training.seed": seed} for seed in SEEDS):
        errors.append(_norm_error(plain.train({**changes, **seed}, STEPS), plain.train({**exact, **seed}, STEPS)))
    return {**adam, "norm_error": max(errors)}, sgd


def trained(pool, ranks: int, changes: dict, job: str = "train_both") -> Trained:
    answers = pool.run(f"tests.support.parity:{job}", ranks, changes=changes)
    return Trained([adam for adam, _ in answers], [sgd for _, sgd in answers])
