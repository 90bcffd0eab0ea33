"""Training a small model for a few steps on any layout, and what invariant I1 compares (DESIGN section 5)."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist

from megagpt2.config.rules import Facts, check
from megagpt2.config.schema import Config
from megagpt2.data.batches import Batches
from megagpt2.data.order import Order
from megagpt2.model.initialize import Initial
from megagpt2.model.parameters import Extent, Spec, specified
from megagpt2.parallel.quiet_deepspeed import deepspeed
from megagpt2.parallel.topology import Topology, build_topology
from megagpt2.training import offload
from megagpt2.training.engine import Engine, build_engine
from megagpt2.training.masters import extents, set_values, weight_extents
from megagpt2.training.step import TrainStep


def small_config(**changes) -> Config:
    """4 layers, 5 heads (no power of two divides them), dropout 0.1 everywhere."""
    config = Config.model_validate({
        "model": {
            "layers": 4, "width": 40, "heads": 5, "vocabulary": 307, "context": 32,
            "embedding_dropout": 0.1, "attention_dropout": 0.1, "residual_dropout": 0.1,
        },
        "batch": {"global_batch": 8, "micro_batch": 1},
        "optimizer": {"learning_rate": 1e-3, "epsilon": 1e-5},
        "schedule": {"name": "constant"},
        "training": {"steps": 5, "precision": "fp32", "device": "cpu"},
    })
    return config.replace(changes)


def corpus(vocabulary: int, tokens: int = 20_000) -> np.ndarray:
    """Tokens with structure to learn: a noisy counting sequence."""
    noise = np.random.default_rng(7).integers(0, 9, tokens)
    return ((np.arange(tokens) * 3 + noise) % vocabulary).astype(np.uint16)


def start(config: Config) -> tuple[Engine, TrainStep, Batches]:
    """An engine on the current process group, with its initial weights, and this replica's data."""
    topology = build_topology(config.parallel.tensor_parallel, config.parallel.pipeline_parallel)
    if config.training.precision == "fp16":
        # torch computes fp16 on any CPU, slowly: what is refused to users for that serves the tests.
        deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    plan = check(config, Facts(world_size=topology.world_size, device="cpu", bf16=True, fp16=True, deepspeed=True))
    engine = build_engine(config, plan, topology, torch.device("cpu"))
    set_values(engine.deepspeed, topology, Initial(config.training.seed))
    tokens = corpus(config.model.vocabulary)
    order = Order(len(tokens), config.sequence_length, config.training.seed)
    return engine, TrainStep(engine), Batches(
        tokens, order, plan.micro_batch, topology.replica, topology.data,
        config.model.vocabulary,
    )


def local_weights(engine: Engine) -> dict[str, tuple[Spec, np.ndarray]]:
    """This rank's part of every weight, gathered from ZeRO-3 where needed, as fp32. All ranks together."""
    found = {}
    for parameter in specified(engine.module):
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_tensor")):
            found[parameter.spec.name] = parameter.spec, parameter.detach().float().numpy().copy()
    return found


def train(changes: dict, steps: int) -> dict:
    """Losses, gradient norms and this rank's weights before and after `steps` steps."""
    config = small_config(**changes)
    engine, step, batches = start(config)
    before = local_weights(engine)
    size = config.batch.global_batch
    results = [
        step(batches.global_batch(n * size, size), engine.plan.accumulation, config.optimizer.learning_rate)
        for n in range(steps)
    ]
    after = local_weights(engine)
    validation = step.validate(batches.global_batch(0, size), engine.plan.accumulation)
    answer = {
        "losses": [r.loss for r in results], "norms": [r.gradient_norm for r in results], "before": before,
        "skipped": [r.skipped for r in results], "scales": [r.loss_scale for r in results],
        "after": after, "validation": validation, "place": place(engine.topology),
    }
    engine.close()
    return answer


def state_bytes(changes: dict) -> dict:
    """Bytes of all floating-point tensors that an engine brought into this process, in the middle of an accumulation
    (all states are there, activations are not), and what describes this rank's part."""
    before = _storages()
    engine, step, batches = start(small_config(**changes))
    size = engine.config.batch.global_batch
    step(batches.global_batch(0, size), engine.plan.accumulation, 1e-3)  # the moments exist after a step
    engine.deepspeed.set_gradient_accumulation_boundary(False)
    for tokens, targets, samples in list(batches.global_batch(size, size))[:2]:
        engine.deepspeed.backward(engine.deepspeed(tokens, samples, targets))
    found = {storage: size for storage, size in _storages().items() if storage not in before}
    sizes = [getattr(parameter, "ds_numel", parameter.numel()) for parameter in specified(engine.module)]
    answer = {"bytes": sum(found.values()), "sizes": sizes, "plan": engine.plan}
    engine.close()
    return answer


def sub_groups(changes: dict) -> tuple[int, int]:
    """The largest sub-group of ZeRO 3: DeepSpeed's, and what is foreseen of it."""
    engine, *_ = start(small_config(**changes))
    answer = max(engine.deepspeed.optimizer.fp16_partitioned_groups_flat_numel)
    engine.close()
    return answer, offload.largest_sub_group(engine.config, engine.plan)


def held(changes: dict) -> dict:
    """The parameters that training builds on this rank: name -> shape of the local tensor."""
    engine, *_ = start(small_config(**changes))
    answer = {p.spec.name: tuple(p.shape) for p in specified(engine.module)}
    where = place(engine.topology)
    engine.close()
    return {"parameters": answer, "place": where}


def _storages() -> dict[int, int]:
    """Bytes of every CPU storage that a floating-point tensor of this process stands in, by its address."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    storages = [t.untyped_storage() for t in tensors if t.device.type == "cpu" and t.is_floating_point()]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def place(topology: Topology) -> tuple[int, int, int]:
    return topology.stage, topology.replica, topology.shard


def whole(parts: list[dict], which: str) -> dict[str, np.ndarray]:
    """Whole tensors from all ranks' parts; asserts that what is held twice is bit-equal (invariant I5)."""
    tensors: dict[str, torch.Tensor] = {}
    seen: dict[tuple, np.ndarray] = {}
    for part in parts:
        for name, (spec, local) in part[which].items():
            key = (name, part["place"][2] if spec.sharded else None)
            if key in seen:
                np.testing.assert_array_equal(seen[key], local, err_msg=f"replicas of {key} differ")
            seen[key] = local
            tensor = tensors.setdefault(name, torch.full(spec.shape, float("nan")))
            spec.place(torch.from_numpy(local), tensor)
    for name, tensor in tensors.items():
        assert not torch.isnan(tensor).any(), f"{name}: a part is held by no rank"
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def error(a: np.ndarray, b: np.ndarray) -> float:
    """I1's measure: largest difference over largest value."""
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))


def save_and_go_on(changes: dict, folder: str, steps: int, load: str | None = None) -> dict:
    """Start (from a checkpoint if named), train `steps` steps, save to `folder`: losses and the checkpoint's path."""
    from megagpt2.checkpoint.load import open_checkpoint
    from megagpt2.checkpoint.save import Ranks, save_checkpoint
    from megagpt2.checkpoint.snapshot import contribution
    from megagpt2.run.material import Material
    from megagpt2.run.resume import load_state, snapshot

    config = small_config(**changes)
    engine, step, batches = start(config)
    progress = load_state(engine, open_checkpoint(Path(load), config.model) if load else None)
    losses, size = [], config.batch.global_batch
    for _ in range(steps):
        result = step(batches.global_batch(progress.samples_seen, size), engine.plan.accumulation, 1e-3)
        progress = progress.after(result, progress.samples_seen + size)
        losses.append(result.loss)
    material = Material(SimpleNamespace(tokens=batches.tokens, manifest=None), None, None)
    mine = contribution(snapshot(engine, progress, material), engine.topology)
    saved = save_checkpoint(Path(folder), mine, Ranks(engine.topology))
    engine.close()
    return {"losses": losses, "saved": str(saved)}


def go_on_from(
    changes: dict, sources: list[str | None], folder: str, steps: int, weights_alone: bool = False
) -> list[dict]:
    """On one engine, for each source, a checkpoint (or its weights alone) or the seed: load it, save what was loaded
    while training goes on (copied as late as may be: after the first step's passes, the update waiting for it), train
    `steps` steps and save again. Losses, the numbers of this rank's samples in each step, both checkpoints' paths, and
    in fp32 the bytes that were read and those that this rank holds."""
    from megagpt2.checkpoint.load import open_checkpoint, open_weights
    from megagpt2.checkpoint.rectangles import rectangles
    from megagpt2.checkpoint.saver import Saver
    from megagpt2.checkpoint.snapshot import Snapshot
    from megagpt2.run.material import Material
    from megagpt2.run.resume import load_state, snapshot

    config = small_config(**changes)
    engine, step, batches = start(config)
    material = Material(SimpleNamespace(tokens=batches.tokens, manifest=None), None, None)
    size, answers = config.batch.global_batch, []

    group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None

    passes_done, copied = threading.Event(), Snapshot.copied

    def copied_late(self: Snapshot) -> Snapshot:
        passes_done.wait()
        copy = copied(self)
        tensors = [*copy.weight_values, *(tensor for parts in copy.slices.values for tensor in parts.values())]
        assert sum(tensor.nbytes for tensor in tensors) == self.bytes()
        return copy

    def begin_to_save(progress, name: str) -> Saver:
        def before_update() -> None:
            passes_done.set()
            saver.before_update()

        saver = Saver(Path(folder) / name, engine.topology, group, asynchronous=True)
        saver.save(snapshot(engine, progress, material))
        step.before_update = before_update
        return saver

    def saved(saver: Saver) -> str:
        passes_done.set()
        outcome = saver.outcome(wait=True)
        assert outcome.error is None and outcome.note is None, outcome
        return str(outcome.folder)

    def held_bytes() -> int:
        """Of what an fp32 run holds: weights (whole, if ZeRO-3 has them gathered at the moment), and masters and two
        moments where this rank has them."""
        def real(held) -> int:
            return 4 * sum(rectangle.elements for extent in held for rectangle in rectangles(extent))

        available = deepspeed.zero.ZeroParamStatus.AVAILABLE
        gathered = [p.spec for p in specified(engine.module) if getattr(p, "ds_status", None) == available]
        return (
            real(weight_extents(engine.deepspeed, engine.topology)) + real(map(Extent.whole, gathered))
            + 3 * real(extents(engine.deepspeed, engine.topology))
        )

    with patch.object(Snapshot, "copied", copied_late):
        for number, source in enumerate(sources):
            loaded = open_checkpoint(Path(source), config.model) if source and not weights_alone else None
            weights = open_weights(Path(source) / "model", config.model) if weights_alone else None
            progress = load_state(engine, loaded, weights)
            read = (loaded.bytes_read, held_bytes()) if loaded and engine.plan.precision == "fp32" else None
            passes_done.clear()
            first = begin_to_save(progress, f"{number}-loaded")
            losses, samples = [], []
            for _ in range(steps):
                micro_batches = list(batches.global_batch(progress.samples_seen, size))
                samples.append(torch.cat([batch.samples for batch in micro_batches]).tolist())
                result = step(iter(micro_batches), engine.plan.accumulation, 1e-3)
                progress = progress.after(result, progress.samples_seen + size)
                losses.append(result.loss)
            paths = [saved(first), saved(begin_to_save(progress, f"{number}-trained"))]
            answers.append({"losses": losses, "samples": samples, "saved": paths, "read": read})
    engine.close()
    return answers


def logits(changes: dict, length: int) -> np.ndarray:
    """What sampling sees: the next token's logits after `length` tokens, from an engine on any layout."""
    from megagpt2.training.inference import next_logits

    config = small_config(**changes)
    engine, _, _ = start(config)
    tokens = torch.from_numpy(corpus(config.model.vocabulary)[: 2 * length].astype(np.int64)).view(2, length)
    answer = next_logits(engine, tokens).numpy()
    engine.close()
    return answer
