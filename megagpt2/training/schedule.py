"""Learning rate as a function of the number of updates made: no state, nothing to save."""

from __future__ import annotations

import math

from megagpt2.config.schema import ScheduleConfig


def learning_rate(schedule: ScheduleConfig, peak: float, updates: int, decay_steps: int) -> float:
    """The rate for the update after `updates` of them.

    Warm-up: peak (updates + 1) / warmup_steps. Then, with x the share of the way from the warm-up to decay_steps:

        cosine     minimum + (1 - minimum) (1 + cos(pi x)) / 2      (Loshchilov and Hutter 2017, equation 5)
        linear     1 - (1 - minimum) x
        wsd        1, and linear to the minimum in the last part    (Hu et al. 2024, section 4)
        constant   1
    """
    if updates < schedule.warmup_steps:
        return peak * (updates + 1) / schedule.warmup_steps
    start = schedule.warmup_steps
    if schedule.name == "constant":
        return peak
    if schedule.name == "wsd":
        start = max(start, decay_steps - round(schedule.wsd_decay_fraction * decay_steps))
    x = min(max((updates - start) / max(decay_steps - start, 1), 0.0), 1.0)
    shape = (1.0 + math.cos(math.pi * x)) / 2.0 if schedule.name == "cosine" else 1.0 - x
    return peak * (schedule.minimum + (1.0 - schedule.minimum) * shape)
