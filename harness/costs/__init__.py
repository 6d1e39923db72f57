"""FLOPs, latency, memory and energy."""
