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
from mvshared.consistency import consistency
from mvshared.errors import OptionError
from mvshared.heads import DEFAULT_FOV_DEG, DEFAULT_RADIUS, composite, render
from mvshared.images import from_model, to_model
from mvshared.metrics import Summary, alpha_mask, background_mask, iou, psnr, ssim, summary
from mvshared.pipeline import Pipeline

HELD_OUT = 100_000
AZIMUTHS_DEG = (45.0, 135.0, 225.0, 315.0)
ELEVATIONS_DEG = (0.0, 20.0)
REFERENCE_AZIMUTH_DEG = 15.0  # references look at the face from within this azimuth
EVALUATION_SEED = 77


class Subject(NamedTuple):
    """A held-out head: reference uint8 (h, w, 4), truth uint8 (v, h, w, 4), its normal maps likewise, cameras (v, 4, 4), and
    the truth's depth float32 (v, h, w) along the optical axis, infinite where nothing is."""

    reference: NDArray[np.uint8]
    truth: NDArray[np.uint8]
    normals: NDArray[np.uint8]
    cameras: NDArray[np.float32]
    depth: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Summaries over all views of all identities, shares of views and identities, and one sheet row per identity.

    `psnr_db`, `ssim` and `silhouette_iou` of the generated views, where a silhouette is what is not white; `copy_*` of the
    reference copied to every view; `vae_*` of the true views encoded and decoded; `normals_iou` of the silhouettes against the
    alpha of the normal maps, if those were given to the model.

    `consistency_*` as in `mvshared.consistency` with the true depth, of the generated views, of the true ones and of the copied
    reference; None for pictures that are too small to compare.

    `identity_agreement` is the share of identities whose generated views are nearer (in mean squared error over all of them) to
    their own true views than to those of any other evaluated identity; `camera_agreement` the share of generated views that are
    nearer to the true view of their camera than to the head's other true views.

    `rows` uint8 (1 + 2 v, h, w, 3): reference, generated views, true views.
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
    consistency_psnr_db: Summary | None
    consistency_ssim: Summary | None
    truth_consistency_psnr_db: Summary | None
    truth_consistency_ssim: Summary | None
    copy_consistency_psnr_db: Summary | None
    copy_consistency_ssim: Summary | None
    normals_iou: Summary | None
    identity_agreement: float
    camera_agreement: float
    rows: tuple[NDArray[np.uint8], ...]

    def summaries(self) -> dict[str, Summary]:
        """The quantities that every view has, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Summary)}

    def shares(self) -> dict[str, float]:
        """The quantities that the evaluation as a whole has, by name: shares from 0 to 1."""
        return {"identity_agreement": self.identity_agreement, "camera_agreement": self.camera_agreement}


def held_out_subject(identity: int, *, size_px: int, azimuths_deg: Sequence[float] = AZIMUTHS_DEG) -> Subject:
    """Render a head for evaluation; its number decides on the views' common elevation and on the reference's camera."""
    random = np.random.default_rng([EVALUATION_SEED, identity])
    elevation = float(random.uniform(*ELEVATIONS_DEG))
    azimuth = float(random.uniform(-REFERENCE_AZIMUTH_DEG, REFERENCE_AZIMUTH_DEG))
    cameras = orbit(azimuths_deg, elevation, radius=DEFAULT_RADIUS)
    reference_camera = orbit([azimuth], float(random.uniform(*ELEVATIONS_DEG)), radius=DEFAULT_RADIUS)
    rendered = render(identity, np.concatenate([reference_camera, cameras]), size_px=size_px)
    return Subject(rendered.rgba[0], rendered.rgba[1:], rendered.normals[1:], cameras, rendered.depth[1:])


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
        name: [] for name, field in Evaluation.__dataclass_fields__.items() if field.type in (Summary, Summary | None)
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
        if normals:
            measured["normals_iou"].append(iou(silhouettes, alpha_mask(subject.normals)))
        for prefix, pictures in (("", views.images), ("truth_", truth), ("copy_", copies)):
            found = consistency(pictures, subject.cameras, fov_deg=DEFAULT_FOV_DEG, depth=subject.depth).views
            for name in ("psnr_db", "ssim"):
                values = [value for figures in found if (value := getattr(figures, name)) is not None]
                measured[f"{prefix}consistency_{name}"].append(np.asarray(values, np.float64))
        assert views.reference is not None
        rows.append(np.concatenate([views.reference[None], views.images, truth]))
    numbers = {name: np.concatenate(values) if values else np.empty(0) for name, values in measured.items()}
    summaries: dict[str, Any] = {name: summary(values) if values.size else None for name, values in numbers.items()}
    count = len(AZIMUTHS_DEG)
    generated, true = (np.stack([row[first : first + count] for row in rows]) for first in (1, 1 + count))
    return Evaluation(
        identities=len(identities),
        views=count,
        identity_agreement=_agreement(generated, true),
        camera_agreement=float(np.mean([_agreement(*views) for views in zip(generated, true, strict=True)])),
        rows=tuple(rows),
        **summaries,
    )


def _agreement(generated: NDArray[np.uint8], truth: NDArray[np.uint8]) -> float:
    """Share of the generated (n, ...) that no other truth (n, ...) is nearer to than their own, in mean squared error."""
    # Sums of products of bytes are exact in float64, so equal pictures have equal distances.
    x, y = (pictures.reshape(len(pictures), -1).astype(np.float64) for pictures in (generated, truth))
    distances = np.square(y).sum(axis=1) - 2 * (x @ y.T)  # less the squares of x, which every candidate has
    return float((np.diag(distances) <= distances.min(axis=1)).mean())
