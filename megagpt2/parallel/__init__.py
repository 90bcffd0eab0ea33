"""Everything that knows of ranks: how they were launched, their groups, and the layers sharded over them."""
