"""DiffPrune, StepPrune's one-shot sibling (arXiv 2605.28051): the same encoder, gate, SoftTopK and denoiser,
with one linear head instead of the loop.

The method itself is in `method`, how it is trained in `learned`; what it shares with StepPrune is in
`methods.stepprune`.
"""
