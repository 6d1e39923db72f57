"""A run: its cells, where they are computed, and what is kept."""
