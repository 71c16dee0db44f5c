"""How good a model's views are after few steps: `python -m benchmarks.samplers -o FOLDER [--model NAME] [--heads 0:16]`.

Views of held-out heads, as `mvmlx evaluate` takes them, by every curve of CURVES: PSNR and SSIM to the true views, and PSNR to
the views that 200 steps of DDIM make of the same noise. Every run is a line of FOLDER/runs.jsonl, so that a sweep that was
stopped goes on; the charts and tables beside it are of the heads that are complete.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.sampler_charts import Curve, Run, write_report
from mvshared.backend import load
from mvshared.errors import ConfigError, MvError
from mvshared.evaluation import held_out_subject
from mvshared.files import make_folder
from mvshared.images import composite
from mvshared.metrics import psnr, ssim
from mvshared.pipeline import Pipeline
from mvshared.weights import sha256_of_files

RUNS = "runs.jsonl"
REFERENCE_STEPS = 200
STEPS, FEW = (4, 6, 8, 10, 15, 20), (8, 15)


def _sampler(scheduler: str, spacing: str, steps: Sequence[int] = STEPS) -> Curve:
    return Curve("samplers", f"{scheduler} {spacing}", {"scheduler": scheduler, "spacing": spacing}, steps)


# What the charts of guidance, and of what saves calls, vary one thing of.
BASELINE, BASELINE_STEPS = "unipc karras", 10
CHOSEN: dict[str, Any] = {"scheduler": "unipc", "spacing": "karras"}


def _varied(chart: str, name: str, **options: Any) -> Curve:
    return Curve(chart, name, CHOSEN | options, (BASELINE_STEPS,))


CURVES = (
    _sampler("ddim", "trailing", (*STEPS, 30)),
    _sampler("dpmpp-2m", "trailing"),
    _sampler("unipc", "trailing"),
    _sampler("dpmpp-2m", "karras"),
    _sampler("unipc", "karras"),
    # These are measured where it shows how they compare.
    _sampler("dpmpp-2m-sde", "trailing", FEW),
    _sampler("dpmpp-2s", "trailing", FEW),
    _sampler("euler", "karras", FEW),
    _sampler("euler-ancestral", "trailing", FEW),
    *(_varied("guidance", f"guidance {scale:g}", guidance=scale) for scale in (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)),
    _varied("savings", "guidance-interval 0,0.5", guidance_interval=(0, 0.5)),
    _varied("savings", "guidance-interval 0.2,0.8", guidance_interval=(0.2, 0.8)),
    _varied("savings", "guidance-interval 0.5,1", guidance_interval=(0.5, 1)),
    _varied("savings", "guidance-every 2", guidance_every=2),
    _varied("savings", "guidance-every 3", guidance_every=3),
    _varied("savings", "kv-pooling 2", kv_pooling=2),
)


def curves_of(guidance: float) -> list[Curve]:
    """Those to measure of a model with that guidance, which the baseline has already."""
    return [curve for curve in CURVES if curve.chart != "guidance" or curve.options["guidance"] != guidance]


def sweep(pipeline: Pipeline[Any], heads: Sequence[int], folder: Path, *, curves: Sequence[Curve]) -> None:
    """Add the runs that `folder` has not yet. Raises ConfigError if it is of another model, dtype or backend."""
    path, about = folder / RUNS, _about(pipeline)
    if not path.exists():
        path.write_text(json.dumps(about) + "\n", encoding="utf-8")
    before, runs = read_runs(path)
    if before != about:
        raise ConfigError("is of another model, dtype or backend", path=path, hint="name another folder")
    done = {run[:3] for run in runs}
    wanted = {head: [(curve, steps) for curve in curves for steps in curve.steps] for head in heads}
    wanted = {head: [each for each in those if (head, each[0].name, each[1]) not in done] for head, those in wanted.items()}
    with path.open("a", encoding="utf-8") as file, tqdm(total=sum(map(len, wanted.values())), unit="run", disable=None) as bar:
        for head, those in wanted.items():
            if not those:
                continue
            subject = held_out_subject(head, size_px=pipeline.model.config.defaults.size_px)
            given: dict[str, Any] = {"image": subject.reference, "cameras": subject.cameras, "seed": 0}
            truth = composite(subject.truth)
            exact = pipeline.generate(**given, scheduler="ddim", spacing="trailing", steps=REFERENCE_STEPS).images
            for curve, steps in those:
                images = pipeline.generate(**given, steps=steps, **curve.options).images
                figures = psnr(images, truth), ssim(images, truth), psnr(images, exact)
                file.write(json.dumps(Run(head, curve.name, steps, *map(_numbers, figures))._asdict()) + "\n")
                file.flush()
                bar.update()


def read_runs(path: Path) -> tuple[dict[str, Any], list[Run]]:
    """What the runs of a file are of, and the runs."""
    if not path.is_file():
        raise ConfigError("no such file: nothing was measured there", path=path)
    first, *lines = path.read_text(encoding="utf-8").splitlines()
    return json.loads(first), [Run(**json.loads(line)) for line in lines]


def _about(pipeline: Pipeline[Any]) -> dict[str, Any]:
    model = pipeline.model
    return {
        "model": pipeline.name,
        "backend": model.backend,
        "dtype": model.dtype,
        "guidance": model.config.defaults.guidance,
        "weights": sha256_of_files(model.weight_files),
    }


def _numbers(figures: NDArray[np.float64]) -> list[float]:
    return [round(float(figure), 5) for figure in figures]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.samplers", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="one that has runs goes on")
    parser.add_argument("--model", default="demo", help="an embedded model's name, or a checkpoint folder")
    parser.add_argument("--heads", type=heads_range, default=range(16), metavar="FIRST:END", help="numbers of held-out heads")
    parser.add_argument("--backend", default="torch", help="auto, mlx or torch")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--report-only", action="store_true", help="draw what is there")
    arguments = parser.parse_args()
    folder = arguments.output
    if not arguments.report_only:
        make_folder(folder)
        load_options = {name: getattr(arguments, name) for name in ("backend", "device", "dtype")}
        pipeline = load(arguments.model, **load_options)
        sweep(pipeline, arguments.heads, folder, curves=curves_of(pipeline.model.config.defaults.guidance))
    about, runs = read_runs(folder / RUNS)
    guidance = about["guidance"]
    baseline: dict[str, Any] = {"guidance": guidance, "baseline": BASELINE, "baseline_steps": BASELINE_STEPS}
    heads = write_report(folder, runs, curves_of(guidance), **baseline)
    if not heads:
        raise MvError("no head has all of its runs yet", hint="the same command goes on")
    print(f"{heads} heads in {folder}/tables.md, samplers.png, guidance.png, savings.png")


def heads_range(text: str) -> range:
    first, _, end = text.partition(":")
    if not first.isdecimal() or not end.isdecimal() or int(first) >= int(end):
        raise argparse.ArgumentTypeError(f"{text!r} must be two whole numbers, the second one larger, such as 0:16")
    return range(int(first), int(end))


if __name__ == "__main__":
    try:
        main()
    except MvError as error:
        sys.exit(" ".join(str(error).split()))
