"""How StepPrune's policy is trained. Nothing here runs at inference (nor enters the key of an answer)."""
