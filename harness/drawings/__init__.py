"""Drawn scenes: what is in them, their pixels, and what is true of them, before any benchmark's wording.

Version 1 is `scenes` and `facts`, version 2 `v2`. `wording` is what the benchmarks' questions share.
"""
