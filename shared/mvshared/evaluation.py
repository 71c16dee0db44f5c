"""How good a model's views of procedural heads are: against true renders, the copied reference and the VAE's ceiling.

Identities below HELD_OUT are never rendered for training; cameras and references are drawn from the identity's number.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from mvshared.camera import orbit
from mvshared.errors import OptionError
from mvshared.heads import DEFAULT_RADIUS, composite, render
from mvshared.images import from_model, to_model
from mvshared.metrics import Summary, background_mask, iou, psnr, ssim, summary
from mvshared.pipeline import Pipeline

HELD_OUT = 100_000
AZIMUTHS_DEG = (45.0, 135.0, 225.0, 315.0)
ELEVATIONS_DEG = (0.0, 20.0)
REFERENCE_AZIMUTH_DEG = 15.0  # references look at the face from within this azimuth
EVALUATION_SEED = 77


class Subject(NamedTuple):
    """A held-out head: reference uint8 (h, w, 4), truth uint8 (v, h, w, 4), its normal maps likewise, cameras (v, 4, 4)."""

    reference: NDArray[np.uint8]
    truth: NDArray[np.uint8]
    normals: NDArray[np.uint8]
    cameras: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Summaries over all views of all identities, and one sheet row per identity.

    `psnr_db`, `ssim` and `silhouette_iou` of the generated views, where a silhouette is what is not white; `copy_*` of the
    reference copied to every view; `vae_*` of the true views encoded and decoded. `rows` uint8 (1 + 2 v, h, w, 3): reference,
    generated views, true views.
    """

    identities: int
    views: int
    psnr_db: Summary
    ssim: Summary
    silhouette_iou: Summary
    copy_psnr_db: Summary
    copy_ssim: Summary
    vae_psnr_db: Summary
    vae_ssim: Summary
    rows: tuple[NDArray[np.uint8], ...]

    def summaries(self) -> dict[str, Summary]:
        """The measured quantities by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Summary)}


def held_out_subject(identity: int, *, size_px: int, azimuths_deg: Sequence[float] = AZIMUTHS_DEG) -> Subject:
    """Render a head for evaluation; its number decides on the views' common elevation and on the reference's camera."""
    random = np.random.default_rng([EVALUATION_SEED, identity])
    elevation = float(random.uniform(*ELEVATIONS_DEG))
    azimuth = float(random.uniform(-REFERENCE_AZIMUTH_DEG, REFERENCE_AZIMUTH_DEG))
    cameras = orbit(azimuths_deg, elevation, radius=DEFAULT_RADIUS)
    reference_camera = orbit([azimuth], float(random.uniform(*ELEVATIONS_DEG)), radius=DEFAULT_RADIUS)
    rendered = render(identity, np.concatenate([reference_camera, cameras]), size_px=size_px)
    return Subject(rendered.rgba[0], rendered.rgba[1:], rendered.normals[1:], cameras)


def evaluate(
    pipeline: Pipeline[Any],
    identities: Sequence[int],
    *,
    steps: int | None = None,
    guidance: float | None = None,
    normals: bool = False,
    seed: int = 0,
) -> Evaluation:
    """Generate the views of held-out heads and compare them with the truth.

    `normals` gives the true normal maps to the model. Raises OptionError for a model that takes none, and without identities.
    """
    if not len(identities):
        raise OptionError("identities", expected="one or more numbers of heads", got=identities)
    model, size_px = pipeline.model, pipeline.model.config.defaults.size_px
    measured: dict[str, list[NDArray[np.float64]]] = {
        name: [] for name in Evaluation.__dataclass_fields__ if name not in ("identities", "views", "rows")
    }
    rows = []
    for identity in tqdm(identities, desc="evaluating", unit="head", disable=None):
        subject = held_out_subject(identity, size_px=size_px)
        views = pipeline.generate(
            subject.reference,
            cameras=subject.cameras,
            normals=list(subject.normals) if normals else None,
            steps=steps,
            guidance=guidance,
            seed=seed,
        )
        truth = composite(subject.truth)
        copies = np.repeat(composite(subject.reference)[None], len(truth), axis=0)
        decoded = from_model(model.decode(model.encode_latents(to_model(truth))))
        measured["psnr_db"].append(psnr(views.images, truth))
        measured["ssim"].append(ssim(views.images, truth))
        silhouettes, true_silhouettes = (background_mask(x, background=(255, 255, 255)) for x in (views.images, truth))
        measured["silhouette_iou"].append(iou(silhouettes, true_silhouettes))
        measured["copy_psnr_db"].append(psnr(copies, truth))
        measured["copy_ssim"].append(ssim(copies, truth))
        measured["vae_psnr_db"].append(psnr(decoded, truth))
        measured["vae_ssim"].append(ssim(decoded, truth))
        assert views.reference is not None
        rows.append(np.concatenate([views.reference[None], views.images, truth]))
    summaries = {name: summary(np.concatenate(values)) for name, values in measured.items()}
    return Evaluation(identities=len(identities), views=len(AZIMUTHS_DEG), rows=tuple(rows), **summaries)
