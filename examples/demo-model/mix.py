"""Weights between a model's and those it was trained to: `python mix.py OUT SHARE BEFORE AFTER [AFTER ...]`, model folders.

The U-Net of OUT is BEFORE's plus SHARE of the way to the mean of the AFTERs' (Wortsman et al., "Robust fine-tuning of zero-shot
models", arXiv 2109.01903): most of what was learned, for little of what small batches spoil elsewhere.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"

if __name__ == "__main__":
    if len(sys.argv) < 5:
        sys.exit(__doc__)
    if Path(sys.argv[1]).exists():
        sys.exit(f"{sys.argv[1]} is there already")
    out, share, (before, *after) = Path(sys.argv[1]), float(sys.argv[2]), map(Path, sys.argv[3:])
    first, *others = (load_file(folder / WEIGHTS) for folder in (before, *after))
    mixed = {}
    for name, weight in first.items():
        mean = np.mean([each[name].astype(np.float32) for each in others], axis=0)
        mixed[name] = ((1 - share) * weight.astype(np.float32) + share * mean).astype(weight.dtype)
    shutil.copytree(before, out)
    save_file(mixed, out / WEIGHTS, metadata={"format": "pt"})
