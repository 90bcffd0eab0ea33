"""FLOPs, tokens per second, MFU, bytes: each has one definition, here (DESIGN D10)."""
