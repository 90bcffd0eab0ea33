"""Text between ranks: as bytes, never pickled. All are collective calls over the whole process group."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def broadcast_text(text: str | None, device: torch.device) -> str | None:
    """Rank 0's text, or None, on every rank."""
    payload = b"" if text is None else text.encode()
    length = torch.tensor([-1 if text is None else len(payload)], device=device)
    dist.broadcast(length, 0)
    count = int(length)
    if count < 0:
        return None
    data = _bytes(payload, device) if dist.get_rank() == 0 else torch.zeros(count, dtype=torch.uint8, device=device)
    dist.broadcast(data, 0)
    return _text(data)


def gather_texts(text: str, device: torch.device) -> list[str]:
    """Every rank's text, by rank, on every rank."""
    mine = _bytes(text.encode(), device)
    if dist.get_world_size() == 1:
        return [text]
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, torch.tensor([len(mine)], device=device))
    longest = max(map(int, lengths))
    if not longest:
        return [""] * len(lengths)
    rows = [torch.zeros(longest, dtype=torch.uint8, device=device) for _ in lengths]
    dist.all_gather(rows, F.pad(mine, (0, longest - len(mine))))
    return [_text(row[: int(length)]) for row, length in zip(rows, lengths, strict=True)]


def _bytes(payload: bytes, device: torch.device) -> Tensor:
    return torch.tensor(list(payload), dtype=torch.uint8, device=device)


def _text(data: Tensor) -> str:
    return bytes(data.tolist()).decode()
