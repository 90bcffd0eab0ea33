"""DeepSpeed, imported in one place: quiet, and without anything that would be compiled at the first use (DESIGN D7)."""

from __future__ import annotations

import logging
import os
import warnings

import torch

# Named, because DeepSpeed's own search warns about every accelerator it does not find.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)

import deepspeed  # noqa: E402
from deepspeed.utils import logger  # noqa: E402

logger.setLevel(logging.ERROR)
warnings.filterwarnings("ignore", "`?torch.distributed.*(into_tensor|scatter_tensor)`? is deprecated", FutureWarning)
# BF16_Optimizer prints the memory in use six times while it is constructed, whatever the log level.
deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda *_, **__: None
# Its shared-memory collective serves inference only, and is built by a compiler when the process group starts.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

__all__ = ["deepspeed"]
