"""What the programs in launch/ share: they wire the other packages together, and may import all of them."""
