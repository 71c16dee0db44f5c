"""What upscaling brings on held-out heads: every method against true renders of twice the size.

Views are upscaled as the model generated them, and as its VAE gives the true ones back: the first shows what a user gets, the
second what the upscaling itself keeps and adds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from mvshared.errors import OptionError
from mvshared.evaluation import VIEWS, held_out_subject
from mvshared.images import composite, from_model, to_model
from mvshared.metrics import Summary, psnr, ssim, summary
from mvshared.pipeline import Pipeline
from mvshared.quantization.plans import preset_of
from mvshared.runs import UPSCALE_METHODS, UpscaleParameters
from mvshared.upscaling.latents import FACTOR
from mvshared.upscaling.views import UpscaleOptions, load_planned, plan_upscale, upscale_views

SHEET_VIEWS = 2


@dataclass(frozen=True, kw_only=True)
class UpscaleEvaluation:
    """`figures` by name: PSNR in dB and SSIM of every method on `generated` views and on `encoded` true ones, against true
    renders of twice the size; `gain` is that of sd-x2 over lanczos, view by view. `settings` are those of sd-x2. `rows` uint8
    (6, h, w, 3): of two generated views each lanczos, sd-x2 and the truth."""

    identities: int
    views: int
    settings: UpscaleParameters
    figures: dict[str, Summary]
    rows: tuple[NDArray[np.uint8], ...]


def evaluate_upscaling(
    pipeline: Pipeline[Any],
    identities: Sequence[int],
    options: UpscaleOptions,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
) -> UpscaleEvaluation:
    """Generate the views of held-out heads, upscale them by every method, and compare. `options` are those of sd-x2.

    Raises OptionError without identities and for options that are not allowed, CheckpointError for the upscaler.
    """
    if not len(identities):
        raise OptionError("identities", expected="one or more numbers of heads", got=identities)
    model = pipeline.model
    config, size_px = model.config, model.config.defaults.size_px
    side = size_px // config.vae.downscale
    planned = plan_upscale(options, vae=config.vae, latent_size=(side, side), backend=model.backend, dtype=model.dtype)
    upscaler = load_planned(
        planned, backend=model.backend, dtype=model.dtype, device=model.device, quantize=preset_of(model.quantization)
    )
    measured: dict[str, list[NDArray[np.float64]]] = {}
    rows = []

    def decode(latents: NDArray[np.float32]) -> NDArray[np.float32]:
        return model.decode(model.from_numpy(latents))

    for identity in tqdm(identities, desc="evaluating", unit="head", disable=None):
        subject = held_out_subject(identity, size_px=size_px)
        truth = composite(held_out_subject(identity, size_px=FACTOR * size_px).truth)
        generated = pipeline.generate(subject.reference, cameras=subject.cameras, steps=steps, guidance=guidance, seed=seed)
        latents = model.to_numpy(model.encode_latents(to_model(composite(subject.truth))))
        encoded = replace(generated, latents=latents, images=from_model(decode(latents)))
        upscaled = {}
        for name, views in (("generated", generated), ("encoded", encoded)):
            for method in UPSCALE_METHODS:
                parameters = planned if method == planned.method else UpscaleParameters(method=method)
                images = upscale_views(views, parameters, decode=decode, upscaler=upscaler).images
                measured.setdefault(f"{name}_{method}_psnr_db", []).append(psnr(images, truth))
                measured.setdefault(f"{name}_{method}_ssim", []).append(ssim(images, truth))
                upscaled[name, method] = images
            for figure in ("psnr_db", "ssim"):
                ours, theirs = (measured[f"{name}_{method}_{figure}"][-1] for method in ("sd-x2", "lanczos"))
                measured.setdefault(f"{name}_gain_{figure}", []).append(ours - theirs)
        shown = (upscaled["generated", "lanczos"], upscaled["generated", "sd-x2"], truth)
        rows.append(np.concatenate([np.stack(views) for views in zip(*(each[:SHEET_VIEWS] for each in shown), strict=True)]))
    return UpscaleEvaluation(
        identities=len(identities),
        views=VIEWS,
        settings=planned,
        figures={name: summary(np.concatenate(values)) for name, values in measured.items()},
        rows=tuple(rows),
    )
