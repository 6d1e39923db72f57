"""Version 2 of Pocket-8: crowded scenes in three regimes, questions that each carry their evidence."""
