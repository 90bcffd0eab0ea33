"""Training: the engine, the loop around it, and what watches and records them."""
