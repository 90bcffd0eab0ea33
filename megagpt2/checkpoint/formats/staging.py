"""Tensors that a file of another program wants all at once, kept on the disk until it is written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megagpt2.parallel.memory import return_freed_memory


def staged(folder: Path, tensor: Tensor) -> Tensor:
    """A copy whose memory is a nameless file in `folder`: the system writes it out and forgets it where memory is
    short, and the file is gone with the tensor."""
    if tensor.numel() == 0:
        return tensor.clone()
    descriptor, name = tempfile.mkstemp(dir=folder, prefix=".staged-")
    size = tensor.numel() * tensor.itemsize
    try:
        os.posix_fallocate(descriptor, 0, size)  # a full disk is an error here, and a crash in mapped memory
        storage = torch.UntypedStorage.from_file(name, shared=True, nbytes=size)
    finally:
        os.close(descriptor)
        os.unlink(name)
    copy = torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape).copy_(tensor)
    return_freed_memory()  # between what stays of each copy the tensors before it would leave holes
    return copy


def save_pickled(path: Path, content: Any) -> None:
    """torch.save of tensors and plain values, for programs that read nothing else."""
    try:
        torch.save(content, path)
    except RuntimeError as error:  # torch's archive writer's
        raise OSError(f"{path} can't be written: {str(error).splitlines()[0]}") from None
