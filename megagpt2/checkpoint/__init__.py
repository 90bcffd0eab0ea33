"""Checkpoints: safetensors and JSON only, valid when the manifest says so, free of the layout that wrote them (D6)."""
