"""The training loop: batches -> step -> record -> validate, sample, save -> until done or told to stop."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Protocol

import numpy as np
import torch

from megagpt2.config.batching import ramped_batch, validation_samples
from megagpt2.config.schema import Config
from megagpt2.data.batches import Batches, Ranges, next_samples, passed_over
from megagpt2.planning import time as planned_time
from megagpt2.training.engine import Engine, agree_any
from megagpt2.training.monitor import Monitor, StepRow, ValidationRow
from megagpt2.training.overflow import describe
from megagpt2.training.replicas import ReplicasDiffer, check_replicas
from megagpt2.training.schedule import learning_rate
from megagpt2.training.step import StepResult, TrainStep
from megagpt2.training.watchdog import STOP_AND_RESUME, StopSignals

FAILED = 1  # exit code
_KEPT_LOSSES = 8
_MOST_SKIPPED = 100  # steps in a row: a loss scale falls from 2**16 to 1 in 16


@dataclass(frozen=True)
class Progress:
    """How far a run is: all that the next step depends on, beside the weights and the optimizer."""

    step: int = 0  # steps made, skipped ones included
    samples_seen: int = 0
    updates: int = 0  # steps that changed the weights
    losses: tuple[float, ...] = field(default=())  # the last ones, newest last
    passed_over: tuple[tuple[int, int], ...] = ()  # of the samples below samples_seen those that data.skip left out

    def after(self, result: StepResult, seen: int, skip: Ranges = ()) -> Progress:
        """After a step whose samples end below number `seen`."""
        return Progress(
            self.step + 1, seen, self.updates + (not result.skipped), (*self.losses, result.loss)[-_KEPT_LOSSES:],
            (*self.passed_over, *passed_over(self.samples_seen, seen, skip)),
        )

    @property
    def trained(self) -> int:
        """Samples that steps were made of."""
        return self.samples_seen - sum(last - first for first, last in self.passed_over)


class Saving(Protocol):
    """How the loop has checkpoints written; checkpoint/saver.py says when what is called."""

    def save(self, progress: Progress) -> None: ...

    def before_update(self) -> None: ...

    def told(self, wait: bool = False) -> Saved | None:
        """What became of the last save, once; None where nothing is to be told (yet). wait: until there is."""


@dataclass(frozen=True)
class Saved:
    """What became of a save, in words."""

    step: int
    text: str
    failed: bool


class NoSaving:
    """Of a loop that saves nothing."""

    def save(self, progress: Progress) -> None:
        pass

    def before_update(self) -> None:
        pass

    def told(self, wait: bool = False) -> Saved | None:
        return None


@dataclass
class Hooks:
    """What the loop calls and does not know: how to save, and how to write a sample (prompt, text)."""

    saving: Saving = field(default_factory=NoSaving)
    samples: Callable[[], list[tuple[str, str]]] | None = None


@dataclass
class Loop:
    """One run, from `progress` on. All ranks run it alike; only rank 0's monitor has sinks."""

    engine: Engine
    train: Batches
    valid: Batches | None
    monitor: Monitor
    hooks: Hooks
    progress: Progress = Progress()
    token_bytes: np.ndarray | None = None  # bytes of each token's text, for bits per byte
    ancestors: int = 0  # how many parent processes are the launcher's: their end stops the run
    last_validation: ValidationRow | None = None
    skipped: int = 0  # steps in a row that changed nothing

    def __post_init__(self) -> None:
        self.config: Config = self.engine.config
        self.step = TrainStep(self.engine, self.hooks.saving.before_update)
        self._resumed_at = self.progress.losses  # what the first loss is compared with
        self._save_failed = False  # the last one
        self._checked: int | None = None  # the step whose replicas were compared last
        self._saved_step = self.progress.step if self.progress.step else -1

    def run(self) -> int:
        """Train to config.training.steps. Returns the exit code: 0, or 75 after a signal."""
        began = self.progress.step
        with StopSignals(self.ancestors) as signals:
            if self.progress.step == 0:
                self.validate()
            while self.progress.step < self.config.training.steps:
                self._one_step()
                every = self.config.training.check_replicas
                if every and self.progress.step % every == 0:
                    self._check_replicas()
                self._hear_of_save()
                stop_unsaved = self._save_failed and self.config.checkpoint.on_save_error == "stop"
                if agree_any(signals.received is not None or stop_unsaved, self.engine.device):
                    return self._stop(signals.received)
                self._every_so_often()
            if self.progress.step == began:
                self.monitor.event(began, f"nothing left to do: training.steps is {began}")
            elif self.last_validation is None or self.last_validation.step != self.progress.step:
                self.validate()
            self.save()
            self._hear_of_save(wait=True)
        return FAILED if self._save_failed else 0

    def _stop(self, signal: str | None) -> int:
        """Before the end: on a signal to any rank, or since a save failed that must not."""
        self._hear_of_save(wait=True)
        if self._save_failed and self.config.checkpoint.on_save_error == "stop":
            self.monitor.event(self.progress.step, "stopping: checkpoint.on_save_error is 'stop'")
            return FAILED
        self.monitor.event(self.progress.step, f"stopping on {signal or 'another rank'}")
        self.save()
        self._hear_of_save(wait=True)
        return FAILED if self._save_failed else STOP_AND_RESUME

    def _one_step(self) -> None:
        config, topology = self.config, self.engine.topology
        size = ramped_batch(config.batch.ramp_up, config.batch.global_batch, self.progress.samples_seen)
        count = size // (self.engine.plan.micro_batch * topology.data)
        rate = learning_rate(
            config.schedule, config.optimizer.learning_rate, self.progress.updates, config.decay_steps
        )
        batches = self.train.global_batch(self.progress.samples_seen, size)
        result = self.step(batches, count, rate)
        samples = next_samples(self.progress.samples_seen, size, self.train.skip)
        if result.skipped:
            self._tell_overflow(result, list(chain.from_iterable(samples)))
        before, self.progress = self.progress, self.progress.after(result, samples[-1].stop, self.train.skip)
        for first, last in self.progress.passed_over[len(before.passed_over):]:
            self.monitor.event(self.progress.step, f"samples {first} to {last - 1} were passed over (data.skip)")
        self.monitor.step(self._row(result, size, rate))
        if self._resumed_at:
            self.monitor.event(self.progress.step, compared_with_stored(result.loss, self._resumed_at))
            self._resumed_at = ()
        self.skipped = self.skipped + 1 if result.skipped else 0
        if self.skipped == _MOST_SKIPPED:
            raise RuntimeError(
                f"the last {_MOST_SKIPPED} steps had gradients that are not finite and changed nothing: resume from an"
                " earlier checkpoint with a smaller optimizer.learning_rate"
            )

    def _tell_overflow(self, result: StepResult, samples: list[int]) -> None:
        plan, step = self.engine.plan, self.progress.step + 1
        if result.loss_scale is None:
            self.monitor.event(
                step, "skipped: a gradient was not finite. Weights and learning rate stay as they are, the samples are"
                " used up"
            )
            return
        where = describe(list(result.overflows), samples, plan.micro_batch, plan.data)
        self.monitor.event(
            step,
            f"skipped: a gradient overflowed at loss scale {result.loss_scale:.0f}, {where}. Weights and learning rate"
            f" stay as they are, the next loss scale is {self.engine.loss_scale:.0f}",
        )

    def _row(self, result: StepResult, size: int, rate: float) -> StepRow:
        length = self.config.sequence_length
        speed = size * length / result.seconds
        world = self.engine.topology.world_size
        tflops = planned_time.model_tflops(self.config.model, length, speed, world)
        peak = self.config.monitor.peak_tflops or self._known_peak()
        return StepRow(
            step=self.progress.step, samples=self.progress.samples_seen, tokens=self.progress.trained * length,
            loss=result.loss, gradient_norm=result.gradient_norm, learning_rate=rate, loss_scale=result.loss_scale,
            skipped=result.skipped, tokens_per_second=speed, model_tflops=tflops * world,
            mfu=tflops / peak if peak else None, seconds_data=result.seconds_data,
            seconds_forward_backward=result.seconds_forward_backward, seconds_optimizer=result.seconds_optimizer,
            seconds_step=result.seconds, memory_bytes=peak_memory(self.engine.device), global_batch=size,
        )

    def _known_peak(self) -> float | None:
        if self.engine.device.type != "cuda":
            return None  # a rank is a share of a processor here: there is no peak to compare it with
        return planned_time.peak_tflops(torch.cuda.get_device_name(self.engine.device))

    def _check_replicas(self) -> None:
        """Raises ReplicasDiffer. What it costs is told once."""
        if self._checked == self.progress.step:
            return
        begin = time.perf_counter()
        try:
            compared = check_replicas(self.engine.module, self.engine.topology)
        except ReplicasDiffer as error:
            self.monitor.event(self.progress.step, str(error))
            raise
        if self._checked is None:
            seconds = time.perf_counter() - begin
            self.monitor.event(
                self.progress.step, f"replicas agree: {compared} parameters of rank 0 compared in {seconds:.3f} s"
            )
        self._checked = self.progress.step

    def _every_so_often(self) -> None:
        step, config = self.progress.step, self.config
        if config.validation.every and step % config.validation.every == 0:
            self.validate()
        if self.hooks.samples and config.monitor.sample_every and step % config.monitor.sample_every == 0:
            for prompt, text in self.hooks.samples():
                self.monitor.sample(step, prompt, text)
        if config.checkpoint.every and step % config.checkpoint.every == 0:
            self.save()

    def save(self) -> None:
        """Save, unless this very step is saved already. Where replicas are compared, what is saved has been."""
        self._hear_of_save(wait=True)  # one at a time; and all ranks know what became of it before they decide
        if self._saved_step != self.progress.step:
            if self.config.training.check_replicas:
                self._check_replicas()
            self.hooks.saving.save(self.progress)
            self._saved_step = self.progress.step

    def _hear_of_save(self, wait: bool = False) -> None:
        saved = self.hooks.saving.told(wait)
        if saved is not None:
            self.monitor.event(saved.step, saved.text)
            self._save_failed = saved.failed
            if saved.failed and self._saved_step == saved.step:
                self._saved_step = -1  # it may be tried again

    def validate(self) -> None:
        """Loss on the same held-out windows each time."""
        if self.valid is None or not self.config.validation.every:
            return
        count, total = self.validation_size()
        loss = self.step.validate(self.valid.global_batch(0, total), count)
        tokens = total * self.config.sequence_length
        bits = None
        if self.token_bytes is not None:
            if not hasattr(self, "_validation_bytes"):
                self._validation_bytes = self._count_bytes(total)
            bits = loss * tokens / (math.log(2) * max(self._validation_bytes, 1))
        self.last_validation = ValidationRow(
            step=self.progress.step, samples=self.progress.samples_seen,
            tokens=self.progress.trained * self.config.sequence_length, loss=loss,
            perplexity=math.exp(min(loss, 700.0)), bits_per_byte=bits,
        )
        self.monitor.validation(self.last_validation)

    def validation_size(self) -> tuple[int, int]:
        """(micro-batches per replica, samples in all): what is asked for, as far as the corpus reaches."""
        micro_batch, replicas = self.engine.plan.micro_batch, self.engine.topology.data
        windows, batch = self.valid.order.windows, self.config.batch.global_batch
        total = validation_samples(self.config.validation.batches, windows, batch, micro_batch, replicas)
        return total // (micro_batch * replicas), total

    def _count_bytes(self, samples: int) -> int:
        """Bytes of text behind the targets of the first `samples` validation windows."""
        length = self.config.sequence_length
        total = 0
        for number in range(samples):
            start = self.valid.order.window(number).start
            total += int(self.token_bytes[self.valid.tokens[start + 1 : start + length + 1]].sum())
        return total


def compared_with_stored(loss: float, stored: Sequence[float]) -> str:
    """What to say of the first loss after resuming: one that jumps is the first sign of a state that was not loaded
    whole. stored: the losses before the checkpoint."""
    spread, middle = max(stored) - min(stored), sorted(stored)[len(stored) // 2]
    near = abs(loss - middle) <= max(3 * spread, 0.1 * abs(middle))  # which a NaN never is
    return (
        f"first loss after resuming {loss:.4f}, the checkpoint's last {len(stored)} are {min(stored):.4f} to"
        f" {max(stored):.4f}" + ("" if near else ": warning: that is far off. Are data and configuration the same?")
    )


def peak_memory(device: torch.device) -> int:
    """Peak bytes so far: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
