"""What the machine can do, as far as a request's legality depends on it."""

import importlib.util
from dataclasses import dataclass
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

    @classmethod
    def detect(cls, world_size: int, device: str = "auto") -> "Facts":
        """Ask torch about this process's device. `auto` is cuda where there is one, and "cuda" stays true to
        the machine: where there is none the facts say cpu, and the rules refuse the request."""
        import torch  # here, so that reading and planning a configuration needs no torch

        deepspeed = importlib.util.find_spec("deepspeed") is not None
        if device in ("auto", "cuda") and torch.cuda.is_available():
            return cls(
                world_size=world_size,
                device="cuda",
                bf16=torch.cuda.is_bf16_supported(including_emulation=False),
                fp16=torch.cuda.get_device_capability() >= (5, 3),
                deepspeed=deepspeed,
            )
        return cls(world_size, "cpu", bf16=_processor_bf16(), fp16=_processor_fp16(), deepspeed=deepspeed)


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
