"""Benchmark harness for visual-token pruning: accuracy (lmms-eval's task code), FLOPs and prefill latency."""
