"""Visual-token pruning methods: one file a method, found by `methods.registry`."""
