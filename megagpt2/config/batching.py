"""Batch arithmetic, as pure functions."""

from megagpt2.config.schema import RampUp


def accumulation_steps(global_batch: int, micro_batch: int, data: int) -> int:
    """Micro-batches that each rank runs per step: global_batch / (micro_batch x data).

    Raises ValueError where that is no integer.
    """
    steps, rest = divmod(global_batch, micro_batch * data)
    if rest or steps < 1:
        raise ValueError(
            f"global_batch {global_batch} is not a multiple of "
            f"micro_batch {micro_batch} x data-parallel size {data} = {micro_batch * data}"
        )
    return steps


def validation_samples(batches: int, windows: int, global_batch: int, micro_batch: int, data: int) -> int:
    """Windows that a validation of `batches` global batches reads of a corpus that has `windows`.

    Whole global batches, which every layout can cut alike, so that all validate on the same windows. Only a corpus of
    less than one is cut as the layout can: to a multiple of micro_batch x data-parallel size.
    """
    stride = micro_batch * data
    return min(batches, windows // global_batch) * global_batch or windows // stride * stride


def ramped_batch(ramp_up: RampUp | None, global_batch: int, samples_seen: int) -> int:
    """Global batch of the step that begins after `samples_seen` samples.

    The rises from start to global_batch are spread evenly over `ramp_up.samples`, as in Megatron; a last rise
    smaller than `increment` is allowed. Depends on samples only, so that a resumed run goes on where it was.
    """
    if ramp_up is None or samples_seen >= ramp_up.samples:
        return global_batch
    rises = -(-(global_batch - ramp_up.start) // ramp_up.increment)
    done = samples_seen * rises // ramp_up.samples
    return min(global_batch, ramp_up.start + done * ramp_up.increment)
