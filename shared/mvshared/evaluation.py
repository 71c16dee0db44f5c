"""How good a model's views of procedural heads are: against true renders, the copied reference and the VAE's ceiling.

Identities below HELD_OUT are never rendered for training; cameras and references are drawn from the identity's number.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from mvshared.arguments import MAX_VIEWS
from mvshared.camera import even_azimuths, from_front_deg, orbit
from mvshared.consistency import MAX_ANGLE_DEG, consistency
from mvshared.errors import OptionError
from mvshared.heads import DEFAULT_FOV_DEG, DEFAULT_RADIUS, render
from mvshared.heads.parts import Part, with_rim
from mvshared.images import composite, from_model, to_model
from mvshared.metrics import Summary, alpha_mask, background_mask, contrast, iou, psnr, ssim, summary
from mvshared.numbers import whole
from mvshared.pipeline import Pipeline

HELD_OUT = 100_000
VIEWS, AZIMUTH_START_DEG = 4, 45.0
ELEVATIONS_DEG = (0.0, 20.0)
REFERENCE_AZIMUTH_DEG = 15.0  # references look at the face from within this azimuth
FRONT_AZIMUTH_DEG = 60.0  # views from within this azimuth show the face
FACE = (Part.SKIN, Part.EYE, Part.BROW, Part.MOUTH, Part.NOSE, Part.GLASSES, Part.BEARD)
DETAIL_RIM_PX = 2  # of what is around an eye or a mouth, from which it must be told apart
MIN_DETAIL_PX = 8  # an eye or a mouth with fewer pixels is hidden, or seen from its edge
EVALUATION_SEED = 77
NONE = np.empty(0)  # figures of views that are not there


class Subject(NamedTuple):
    """A held-out head: reference uint8 (h, w, 4), truth uint8 (v, h, w, 4), its normal maps likewise, cameras (v, 4, 4), the
    truth's depth float32 (v, h, w) along the optical axis, infinite where nothing is, and, in views from the front alone, where
    the truth shows the face, the eyes with a rim, and the mouth with a rim, bool (v, h, w)."""

    reference: NDArray[np.uint8]
    truth: NDArray[np.uint8]
    normals: NDArray[np.uint8]
    cameras: NDArray[np.float32]
    depth: NDArray[np.float32]
    face: NDArray[np.bool_]
    eyes: NDArray[np.bool_]
    mouth: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Summaries over all views of all identities, shares of views and identities, and one sheet row per identity.

    `psnr_db`, `ssim` and `silhouette_iou` of the generated views, where a silhouette is what is not white; `copy_*` of the
    reference copied to every view; `vae_*` of the true views encoded and decoded; `normals_iou` of the silhouettes against the
    alpha of the normal maps, if those were given to the model. `face_psnr_db` counts only pixels of FACE in views from within
    FRONT_AZIMUTH_DEG; None without such views. `eye_contrast` and `mouth_contrast` are `mvshared.metrics.contrast` of eyes
    and mouths with what is around them, in the same views where those are seen: 1 is as clear as in the truth, 0 is nothing.

    `consistency_*` as in `mvshared.consistency` with the true depth, of the generated views, of the true ones and of the copied
    reference; None for pictures that are too small to compare, and for fewer than four views, which are too far apart.

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
    face_psnr_db: Summary | None
    copy_face_psnr_db: Summary | None
    vae_face_psnr_db: Summary | None
    eye_contrast: Summary | None
    copy_eye_contrast: Summary | None
    vae_eye_contrast: Summary | None
    mouth_contrast: Summary | None
    copy_mouth_contrast: Summary | None
    vae_mouth_contrast: Summary | None
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


def held_out_subject(identity: int, *, size_px: int, views: int = VIEWS) -> Subject:
    """Render a head for evaluation, from azimuths that are spread evenly from AZIMUTH_START_DEG on; its number decides on the
    views' common elevation and on the reference's camera.

    A view of the face is harder than one of the back. So that all numbers of views are measured in the same directions, one
    to three, five to seven and so on start with every fourth head at AZIMUTH_START_DEG, and a quarter turn on with the next.
    """
    random = np.random.default_rng([EVALUATION_SEED, identity])
    elevation = float(random.uniform(*ELEVATIONS_DEG))
    azimuth = float(random.uniform(-REFERENCE_AZIMUTH_DEG, REFERENCE_AZIMUTH_DEG))
    turn_deg = 90.0 * (identity % 4) if views % 4 else 0.0
    azimuths_deg = even_azimuths(views, start_deg=AZIMUTH_START_DEG + turn_deg)
    cameras = orbit(azimuths_deg, elevation, radius=DEFAULT_RADIUS)
    reference_camera = orbit([azimuth], float(random.uniform(*ELEVATIONS_DEG)), radius=DEFAULT_RADIUS)
    rendered = render(identity, np.concatenate([reference_camera, cameras]), size_px=size_px)
    front = np.abs(from_front_deg(azimuths_deg)) <= FRONT_AZIMUTH_DEG
    parts = np.where(front[:, None, None], rendered.parts[1:], Part.BACKGROUND)
    return Subject(
        rendered.rgba[0],
        rendered.rgba[1:],
        rendered.normals[1:],
        cameras,
        rendered.depth[1:],
        face=np.isin(parts, FACE),
        eyes=rimmed(parts == Part.EYE),
        mouth=rimmed(parts == Part.MOUTH),
    )


def evaluate(
    pipeline: Pipeline[Any],
    identities: Sequence[int],
    *,
    views: int = VIEWS,
    together: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    scheduler: str | None = None,
    spacing: str | None = None,
    prompt: str | None = None,
    negative_prompt: str | None = None,
    normals: bool = False,
    seed: int = 0,
) -> Evaluation:
    """Generate the views of held-out heads and compare them with the truth.

    A run has `together` of a head's views, by default all, so that different numbers can be compared on the same directions.
    `normals` gives the true normal maps to the model. Every head has the same prompts, and without them those of `generate`.
    Raises OptionError for a model that takes no normal maps or no text, without identities, and for numbers of views that are
    not allowed.
    """
    views = whole("views", views, 1, MAX_VIEWS)
    together = views if together is None else whole("together", together, 1, MAX_VIEWS)
    if not len(identities):
        raise OptionError("identities", expected="one or more numbers of heads", got=identities)
    model, size_px = pipeline.model, pipeline.model.config.defaults.size_px
    if not model.config.unet.takes_pictures:
        raise OptionError("model", expected="one that takes a picture: views of heads are compared", got=pipeline.name)
    options: dict[str, Any] = {"steps": steps, "guidance": guidance, "scheduler": scheduler, "spacing": spacing, "seed": seed}
    options |= {"prompt": prompt, "negative_prompt": negative_prompt}
    rows, measured = [], list[dict[str, NDArray[np.float64]]]()
    for identity in tqdm(identities, desc="evaluating", unit="head", disable=None):
        subject = held_out_subject(identity, size_px=size_px, views=views)
        runs = [
            pipeline.generate(
                subject.reference,
                cameras=subject.cameras[at : at + together],
                normals=list(subject.normals[at : at + together]) if normals else None,
                **options,
            )
            for at in range(0, views, together)
        ]
        generated, reference, truth = np.concatenate([run.images for run in runs]), runs[0].reference, composite(subject.truth)
        decoded = from_model(model.decode(model.encode_latents(to_model(truth))))
        found = _compared(subject, generated, truth, decoded)
        if normals:
            found["normals_iou"] = iou(_silhouettes(generated), alpha_mask(subject.normals))
        measured.append(found)
        assert reference is not None
        rows.append(np.concatenate([reference[None], generated, truth]))
    names = [name for name, field in Evaluation.__dataclass_fields__.items() if field.type in (Summary, Summary | None)]
    numbers = {name: np.concatenate([found.get(name, NONE) for found in measured]) for name in names}
    summaries: dict[str, Any] = {name: summary(values) if values.size else None for name, values in numbers.items()}
    made, true = (np.stack([row[first : first + views] for row in rows]) for first in (1, 1 + views))
    return Evaluation(
        identities=len(identities),
        views=views,
        identity_agreement=_agreement(made, true),
        camera_agreement=float(np.mean([_agreement(*each) for each in zip(made, true, strict=True)])),
        rows=tuple(rows),
        **summaries,
    )


def _compared(
    subject: Subject, generated: NDArray[np.uint8], truth: NDArray[np.uint8], decoded: NDArray[np.uint8]
) -> dict[str, NDArray[np.float64]]:
    """The figures of a head by the names of `Evaluation`, of the views that have them: of generated views uint8 (v, h, w, 3),
    of the reference in their place, and of what the VAE makes of the truth, all against the truth."""
    views, copies = len(truth), np.repeat(composite(subject.reference)[None], len(truth), axis=0)
    found: dict[str, NDArray[np.float64]] = {"silhouette_iou": iou(_silhouettes(generated), _silhouettes(truth))}
    for prefix, pictures in (("", generated), ("copy_", copies), ("vae_", decoded)):
        found |= {f"{prefix}psnr_db": psnr(pictures, truth), f"{prefix}ssim": ssim(pictures, truth)}
        for name, metric, mask in (
            ("face_psnr_db", psnr, subject.face),
            ("eye_contrast", contrast, subject.eyes),
            ("mouth_contrast", contrast, subject.mouth),
        ):
            seen = mask.any(axis=(1, 2))
            found[prefix + name] = metric(pictures[seen], truth[seen], mask=mask[seen]) if seen.any() else NONE
    near = views >= 360 / MAX_ANGLE_DEG  # else no two views show a common surface
    for prefix, pictures in (("", generated), ("truth_", truth), ("copy_", copies)) if near else ():
        figures = consistency(pictures, subject.cameras, fov_deg=DEFAULT_FOV_DEG, depth=subject.depth).views
        for name in ("psnr_db", "ssim"):
            values = [value for each in figures if (value := getattr(each, name)) is not None]
            found[f"{prefix}consistency_{name}"] = np.asarray(values, np.float64)
    return found


def _silhouettes(pictures: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Where pictures (v, h, w, 3) over white show something, bool (v, h, w)."""
    return background_mask(pictures, background=(255, 255, 255))


def rimmed(parts: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Where a small part is or is near, bool (v, h, w); nowhere in views that show less than MIN_DETAIL_PX of it."""
    return with_rim(parts, DETAIL_RIM_PX) & (parts.sum(axis=(1, 2)) >= MIN_DETAIL_PX)[:, None, None]


def _agreement(generated: NDArray[np.uint8], truth: NDArray[np.uint8]) -> float:
    """Share of the generated (n, ...) that no other truth (n, ...) is nearer to than their own, in mean squared error."""
    # Sums of products of bytes are exact in float64, so equal pictures have equal distances.
    x, y = (pictures.reshape(len(pictures), -1).astype(np.float64) for pictures in (generated, truth))
    distances = np.square(y).sum(axis=1) - 2 * (x @ y.T)  # less the squares of x, which every candidate has
    return float((np.diag(distances) <= distances.min(axis=1)).mean())
