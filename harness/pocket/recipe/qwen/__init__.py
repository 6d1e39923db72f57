"""`pocket-qwen`: a small Qwen2.5-VL, trained here on drawn scenes of any size."""
