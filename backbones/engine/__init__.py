"""Putting a pruner on a model by hooks."""
