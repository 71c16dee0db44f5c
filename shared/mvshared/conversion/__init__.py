"""Checkpoints of other layouts: original files of Stable Diffusion, MVDream, ImageDream and OpenCLIP, and back."""
