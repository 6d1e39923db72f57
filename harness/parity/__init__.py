"""Our methods against recordings of released code."""
