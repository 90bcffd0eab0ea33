"""GPT-2 as a list of layers. Nothing in here knows of ranks: a Builder supplies what may be sharded (D1)."""
