"""Shared by the tests: the pool of worker processes, small models, the measure of invariant I1."""
