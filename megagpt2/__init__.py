"""megagpt2: GPT-2 from raw text to an evaluated model, on one CPU or many nodes, with one command."""

__version__ = "0.1.0"
