"""Benchmarks: their data, questions and scores."""
