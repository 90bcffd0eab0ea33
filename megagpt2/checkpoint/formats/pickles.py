"""Opening other programs' .pt files: pickles, which may hold any program.

torch's weights_only unpickler calls nothing but what it is given by name. Real files of DeepSpeed and Megatron-LM name
classes of theirs beside the tensors (a loss scaler, argparse's Namespace, enumerations, numpy arrays of random state).
Each name in NAMES gets a stand-in that holds what was pickled and does nothing; neither DeepSpeed nor Megatron is
imported. A file that names anything else is refused before it is read.

Files are mapped, so that a tensor's bytes are read when it is used. torch does not compare a mapped tensor with the
archive's own sizes: that is done here.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megagpt2.checkpoint.store import CheckpointError

NAMES = frozenset({
    "argparse.Namespace", "types.SimpleNamespace", "pathlib.PosixPath", "signal.Signals", "builtins.getattr",
    "_io.BytesIO", "builtins.bytes", "torch._C.Generator",
    "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype",
    "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler", "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum", "deepspeed.utils.tensor_fragment.fragment_address",
    "deepspeed.runtime.bf16_optimizer.fragment_address", "deepspeed.checkpoint.universal_checkpoint.SubparamShape",
    "deepspeed.runtime.data_pipeline.curriculum_scheduler.CurriculumScheduler",
    "megatron.model.enums.ModelType", "megatron.core.enums.ModelType", "megatron.enums.PositionEmbeddingType",
    "megatron.core.transformer.enums.AttnBackend", "megatron.core.transformer.enums.CudaGraphScope",
    "megatron.core.transformer.enums.CudaGraphModule", "megatron.core.transformer.enums.InferenceCudaGraphScope",
    "megatron.core.rerun_state_machine.RerunState", "megatron.core.rerun_state_machine.RerunMode",
    "megatron.core.rerun_state_machine.RerunDiagnostic", "megatron.core.optimizer.optimizer_config.OptimizerConfig",
    "fp16.loss_scaler.LossScaler", "fp16.loss_scaler.DynamicLossScaler", "megatron.fp16.loss_scaler.LossScaler",
    "megatron.fp16.loss_scaler.DynamicLossScaler", "megatron.fp16_deprecated.loss_scaler.LossScaler",
    "megatron.fp16_deprecated.loss_scaler.DynamicLossScaler",
})
"""What may be pickled beside what torch itself allows (tensors, types, shapes, plain containers)."""


class Inert:
    """Holds what was pickled under another class's name: attributes, or the arguments it was called with."""

    def __new__(cls, *arguments: Any) -> Inert:
        return object.__new__(cls)

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            named = {key: value for key, value in state.items() if isinstance(key, str) and not key.startswith("__")}
            self.__dict__.update(named)
        else:
            self.state = state


class _Array(Inert):
    """What numpy's `_reconstruct` and `scalar` would have made."""


def _array(*arguments: Any) -> _Array:
    return _Array(*arguments)


def _member(kind: Any, name: Any) -> Inert:
    """An enumeration's member as Python 3.11.2 pickles it, getattr(class, name); never the real getattr."""
    if not (isinstance(kind, type) and issubclass(kind, Inert) and isinstance(name, str)):
        raise ValueError("getattr of something else than an enumeration")
    return kind(name)


def _stand_in(name: str) -> Any:
    if name == "builtins.getattr":
        return _member
    if name.endswith(("._reconstruct", ".scalar")):
        return _array
    return type(name.rpartition(".")[2], (Inert,), {})


def load_pickled(path: Path) -> Any:
    """What is in a .pt file, tensors on the CPU and mapped. Raises CheckpointError where it is no file of tensors, or
    wants what NAMES does not hold."""
    try:
        sizes = _sizes_of_storages(path)
        wanted = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        if refused := sorted(set(wanted) - NAMES):
            raise CheckpointError(
                f"{path} wants {', '.join(refused)}, which could be any program: it is not opened. A file of tensors"
                " alone, saved anew by the program that wrote this one, can be"
            )
        allowed = [(_stand_in(name), name) for name in wanted] + [_Array]
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        held = [(name, tensor.untyped_storage().nbytes()) for name, tensor in tensors_in(content)]
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except CheckpointError:
        raise
    except Exception as error:  # in a foreign file anything can be wrong
        raise CheckpointError(f"{path} can't be opened as a file of tensors: {_first_line(error)}") from None
    for name, size in held:
        if size not in sizes:
            raise CheckpointError(f"{path}: {name} has {size} bytes, which no record has")
    return content


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _sizes_of_storages(path: Path) -> set[int]:
    """Bytes of the archive's records; ValueError where a mapped tensor would not be what was saved."""
    if not zipfile.is_zipfile(path):
        raise ValueError("it is not a zip archive, as torch.save writes since 1.6: save it anew with a newer torch")
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if packed := [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]:
            raise ValueError(f"its record {packed[0]} is compressed")
        for entry in entries:
            if entry.filename.endswith("/byteorder") and archive.read(entry) != b"little":
                raise ValueError("it was written on a big-endian machine")
        return {entry.file_size for entry in entries}


def tensors_in(content: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested dicts, lists and stand-ins, with the path to it."""
    if isinstance(content, Tensor):
        yield name, content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from tensors_in(value, f"{name}.{key}" if name else str(key))
    elif isinstance(content, (list, tuple)):
        for number, value in enumerate(content):
            yield from tensors_in(value, f"{name}[{number}]")
    elif isinstance(content, Inert):
        yield from tensors_in(vars(content), name)
