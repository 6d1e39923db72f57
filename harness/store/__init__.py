"""What a run writes: records, answers."""
