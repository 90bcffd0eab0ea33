"""What the machine can do, as far as a request's legality depends on it."""

import importlib.metadata
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Facts:
    """The machine under a run. Fields can be given by hand to plan for a machine that is elsewhere."""

    world_size: int
    """Number of ranks, one device each."""
    device: Literal["cpu", "cuda"] = "cpu"
    bf16: bool = False
    """The device computes bf16 in hardware."""
    fp16: bool = False
    """The device computes fp16 in hardware."""
    deepspeed: bool = True
    """DeepSpeed can be imported."""
    operators: str | None = None
    """Why the compiled operators of csrc/ can't be used on the device; None where they can."""
    apex: str | None = None
    """Why NVIDIA apex can't be used; None where it can."""
    nvme: bool = True
    """DeepSpeed's operators for NVMe are built (`make setup-nvme`)."""

    @classmethod
    def detect(cls, world_size: int, device: str = "auto") -> "Facts":
        """Ask torch about this process's device. `auto` is cuda where there is one, and "cuda" stays true to
        the machine: where there is none the facts say cpu, and the rules refuse the request. `operators` is left
        to the caller: kernels/extension.py knows."""
        import torch  # here, so that reading and planning a configuration needs no torch

        deepspeed = importlib.util.find_spec("deepspeed") is not None
        if device in ("auto", "cuda") and torch.cuda.is_available():
            return cls(
                world_size=world_size,
                device="cuda",
                bf16=torch.cuda.is_bf16_supported(including_emulation=False),
                fp16=torch.cuda.get_device_capability() >= (5, 3),
                deepspeed=deepspeed,
                apex=apex_problem(),
                nvme=nvme_operators_built(),
            )
        return cls(
            world_size, "cpu", bf16=_processor_bf16(), fp16=_processor_fp16(), deepspeed=deepspeed,
            apex="it computes on GPUs, and this is a CPU", nvme=nvme_operators_built(),
        )


def apex_problem() -> str | None:
    """Why NVIDIA apex can't be used, or None. The package index's "apex" is another project, without these parts."""
    if importlib.util.find_spec("apex") is None:
        return "it can't be imported (build it from github.com/NVIDIA/apex)"
    for part in ("apex.normalization", "apex.optimizers"):
        try:
            if importlib.util.find_spec(part) is None:
                return f"the apex that is installed has no {part}: it is another project, or built without extensions"
        except ImportError as error:
            return f"{part} can't be imported ({error})"
    for module in ("fused_layer_norm_cuda", "amp_C"):  # what these parts load at their first use
        if importlib.util.find_spec(module) is None:
            return f"apex was built without its CUDA extensions ({module} is missing): build it with APEX_CUDA_EXT=1"
    return None


NVME_OPERATORS = ("pin_memory", "async_io")
"""DeepSpeed's names of them, in the order in which they must be loaded: the second uses the first."""


def nvme_operator_files() -> list[Path]:
    """Where `make setup-nvme` puts each operator: in the Python environment, by what they are compiled against."""
    versions = "-".join(f"{name}{importlib.metadata.version(name)}" for name in ("torch", "deepspeed"))
    folder = Path(sys.prefix) / "megagpt2-nvme" / f"{sys.implementation.cache_tag}-{versions}"
    return [folder / f"{name}.so" for name in NVME_OPERATORS]


def nvme_operators_built() -> bool:
    """True where all of them are there."""
    try:
        return all(path.is_file() for path in nvme_operator_files())
    except importlib.metadata.PackageNotFoundError:
        return False


def _processor_bf16() -> bool:
    """True for bf16 instructions (AVX512-BF16, AMX, Arm's). oneDNN's own answer is wider: it counts
    emulation, which is right but slower than fp32, so it is no reason to choose bf16 by default."""
    import torch

    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(present for name, present in capabilities.items() if name.endswith("bf16"))


def _processor_fp16() -> bool:
    """DeepSpeed asks the same of oneDNN before it takes fp16 on CPU; a build without oneDNN has none."""
    import torch

    try:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    except (AttributeError, RuntimeError):
        return False
