"""Tests have small tensors: here, and in workers that inherit the environment, the compiled operators take any."""

import os

os.environ.setdefault("MEGAGPT2_OPERATORS", "always")  # before megagpt2.kernels is imported
