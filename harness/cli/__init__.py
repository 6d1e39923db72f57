"""Command lines: what a person types."""
