"""How well views follow their conditions, the table of docs/guidance.md: `python -m benchmarks.guidance [--heads 0:6]`.

Views of held-out heads, as `mvmlx evaluate` takes them, at the model's defaults but for the options of ROWS.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from benchmarks.samplers import heads_range
from mvshared.backend import load
from mvshared.errors import MvError
from mvshared.evaluation import held_out_subject
from mvshared.images import composite
from mvshared.metrics import background_mask, iou, psnr, ssim
from mvshared.pipeline import Pipeline

WHITE = (255, 255, 255)


class Row(NamedTuple):
    """A row's name, the network's calls in a step, the options of `generate`, and whether it is given the true normal maps."""

    name: str
    calls: str
    options: dict[str, Any]
    normals: bool = False


ROWS = (
    Row("defaults", "2", {}),
    *(Row(f"`--guidance-image` {scale}", "1" if scale == 1 else "2", {"guidance_image": scale}) for scale in (1, 2, 3, 5)),
    Row("`--guidance-image` 5 `--guidance-rescale` 0.7", "2", {"guidance_image": 5, "guidance_rescale": 0.7}),
    Row("`--guidance-rescale` 0.7", "2", {"guidance_rescale": 0.7}),
    Row("`--guidance-interval` 0,0.5", "2, then 1", {"guidance_interval": (0, 0.5)}),
    Row("`--guidance-interval` 0.5,1", "1, then 2", {"guidance_interval": (0.5, 1)}),
    Row("`--guidance-interval` 0.2,0.8", "1, 2, 1", {"guidance_interval": (0.2, 0.8)}),
    *(Row(f"`--reference-scale` {scale:g}", "2", {"reference_scale": scale}) for scale in (0, 0.5, 1.5, 2)),
    Row("true normal maps, defaults", "2", {}, normals=True),
    *(
        Row(f"the same, `--guidance-normals` {scale:g}", "3", {"guidance_normals": scale}, normals=True)
        for scale in (1.5, 2, 3, 5)
    ),
)


def measure(pipeline: Pipeline[Any], heads: Sequence[int], rows: Iterable[Row] = ROWS) -> list[str]:
    """The table's lines: per row the mean PSNR, SSIM and silhouette IoU of the heads' views."""
    subjects = [held_out_subject(head, size_px=pipeline.model.config.defaults.size_px) for head in heads]
    lines = ["| | calls a step | PSNR, dB | SSIM | silhouette IoU |", "|---|---|---|---|---|"]
    for row in tqdm(rows, unit="row", disable=None):
        figures = []
        for subject in subjects:
            normals = list(subject.normals) if row.normals else None
            views = pipeline.generate(subject.reference, cameras=subject.cameras, normals=normals, seed=0, **row.options)
            truth = composite(subject.truth)
            silhouettes = iou(*(background_mask(pictures, background=WHITE) for pictures in (views.images, truth)))
            figures.append([psnr(views.images, truth), ssim(views.images, truth), silhouettes])
        decibels, similarity, overlap = np.mean(figures, axis=(0, 2))
        lines.append(f"| {row.name} | {row.calls} | {decibels:.1f} | {similarity:.3f} | {overlap:.3f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guidance", description=__doc__)
    parser.add_argument("--model", default="demo", help="an embedded model's name, or a checkpoint folder")
    parser.add_argument("--heads", type=heads_range, default=range(6), metavar="FIRST:END", help="numbers of held-out heads")
    parser.add_argument("--backend", default="torch", help="auto, mlx or torch")
    parser.add_argument("--device", default="cpu", help="that of docs/guidance.md is the cpu")
    arguments = parser.parse_args()
    pipeline = load(arguments.model, backend=arguments.backend, device=arguments.device, dtype="float32")
    print(*measure(pipeline, arguments.heads), sep="\n")


if __name__ == "__main__":
    try:
        main()
    except MvError as error:
        sys.exit(" ".join(str(error).split()))
