"""Checkpoints of the Hugging Face hub: which ones are known by a short name, where a copy of one lies on this
machine, and how it is loaded (devices, quantisation, how images and prompts are prepared).

Nothing here asks the network unless `find` is told to download, and then it says so first.
"""
