"""`pocket-llava`: a small LLaVA-1.5, trained here on procedurally drawn scenes."""
