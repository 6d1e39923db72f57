"""Visual-token pruning methods: one file per method, found by `methods.registry`."""
