"""Evaluation on held-out heads: the same subjects every time, figures that agree with a computation by hand."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import BACKENDS, TINY_MODEL, Backend, record, write_tiny_model
from numpy.typing import NDArray
from scipy import ndimage
from skimage.metrics import structural_similarity

import mvshared.evaluation
from mvshared.backend import load
from mvshared.camera import azimuth_elevation
from mvshared.errors import OptionError
from mvshared.evaluation import Evaluation, evaluate, held_out_subject
from mvshared.heads import DEFAULT_RADIUS, render
from mvshared.heads.parts import Part
from mvshared.images import composite, from_model, to_model
from mvshared.metrics import Summary, contrast
from mvshared.pipeline import Pipeline

SIZE_PX = TINY_MODEL.defaults.size_px
FACE = {f"{of}{name}" for of in ("", "copy_", "vae_") for name in ("face_psnr_db", "eye_contrast", "mouth_contrast")}
CONSISTENCY = {f"{of}consistency_{name}" for of in ("", "truth_", "copy_") for name in ("psnr_db", "ssim")}
FIGURES = {"psnr_db", "ssim", "silhouette_iou", "copy_psnr_db", "copy_ssim", "vae_psnr_db", "vae_ssim"} | CONSISTENCY | FACE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module", params=BACKENDS)
def pipeline(request: pytest.FixtureRequest, folder: Path) -> Pipeline[Any]:
    backend: Backend = request.param
    return load(folder, backend=backend, device="cpu")


@pytest.fixture(scope="module")
def evaluation(pipeline: Pipeline[Any]) -> Evaluation:
    return evaluate(pipeline, range(2), steps=1)


class Oracle(Pipeline[Any]):
    """Gives the true views, and keeps the options of every call."""

    def __init__(self, model: Any) -> None:
        super().__init__(model, name="oracle")
        self.options: list[dict[str, Any]] = []

    def generate(self, image: Any = None, **options: Any) -> Any:
        identity = len(self.options)
        self.options.append(options)
        subject = held_out_subject(identity, size_px=len(image))
        np.testing.assert_array_equal(image, subject.reference)
        np.testing.assert_array_equal(options["cameras"], subject.cameras)
        return SimpleNamespace(images=composite(subject.truth), reference=composite(image))


def truths(identities: range, size_px: int = SIZE_PX) -> NDArray[np.uint8]:
    return np.concatenate([composite(held_out_subject(identity, size_px=size_px).truth) for identity in identities])


def figures(pictures: NDArray[np.uint8], references: NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """PSNR by hand and scikit-image's SSIM, per view."""
    squares = (pictures.astype(np.float64) - references) ** 2
    similar = [
        structural_similarity(x, y, gaussian_weights=True, use_sample_covariance=False, channel_axis=-1, data_range=255)
        for x, y in zip(pictures, references, strict=True)
    ]
    return 10 * np.log10(255**2 / squares.mean(axis=(1, 2, 3))), np.asarray(similar)


def assert_summarises(summary: Summary, values: NDArray[np.float64]) -> None:
    assert summary == pytest.approx((values.mean(), values.std(), values.min(), values.max()), rel=1e-6)


def test_a_held_out_subject_is_the_same_every_time() -> None:
    first, second, other = (held_out_subject(identity, size_px=64) for identity in (3, 3, 4))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b, strict=True)
    assert not any(np.array_equal(a, c) for a, c in zip(first, other, strict=True))
    assert [array.shape for array in first] == [
        (64, 64, 4),
        (4, 64, 64, 4),
        (4, 64, 64, 4),
        (4, 4, 4),
        *[(4, 64, 64)] * 4,
    ]


def test_references_look_at_the_face_and_views_go_around_at_one_elevation(monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[tuple[int, NDArray[np.float32]]] = []

    def render(identity: int, cameras: NDArray[np.float32], *, size_px: int) -> Any:
        rendered.append((identity, cameras))
        return SimpleNamespace(**{name: np.zeros((len(cameras), 1)) for name in ("rgba", "normals", "depth", "parts")})

    monkeypatch.setattr(mvshared.evaluation, "render", render)
    subjects = [held_out_subject(identity, size_px=8) for identity in range(40)]
    assert [identity for identity, _ in rendered] == list(range(40))
    references = azimuth_elevation([cameras[0] for _, cameras in rendered])
    azimuths = (references.azimuths_deg + 180) % 360 - 180
    for angles, low, high in ((azimuths, -15, 15), (references.elevations_deg, 0, 20)):
        assert low <= angles.min() < low + 5 and high - 5 < angles.max() <= high
    for subject, (_, cameras) in zip(subjects, rendered, strict=True):
        np.testing.assert_array_equal(subject.cameras, cameras[1:])
        around = azimuth_elevation(cameras[1:])
        np.testing.assert_allclose(around.azimuths_deg, [45, 135, 225, 315], atol=1e-3)
        np.testing.assert_allclose(around.elevations_deg, around.elevations_deg[0], atol=1e-3)
        np.testing.assert_allclose(around.radii, DEFAULT_RADIUS, rtol=1e-6)
    elevations = np.array([azimuth_elevation(subject.cameras).elevations_deg[0] for subject in subjects])
    assert 0 <= elevations.min() < 5 and 15 < elevations.max() <= 20


@pytest.mark.parametrize("views", [1, 2, 3, 4, 6, 8])
def test_all_numbers_of_views_look_from_all_quarters_alike(views: int) -> None:
    cameras = [held_out_subject(head, size_px=8, views=views).cameras for head in range(8, 12)]
    azimuths = azimuth_elevation(np.concatenate(cameras)).azimuths_deg.round().astype(int) % 360
    assert sorted((azimuths + 90) % 360) == sorted(azimuths) and 45 in azimuths


def test_a_model_that_takes_no_picture_is_not_evaluated() -> None:
    pipe = load(Path(__file__).parent / "fixtures" / "tiny-mvdream", backend="torch", device="cpu")
    with pytest.raises(OptionError, match=r"model must be one that takes a picture: .* got '.*tiny-mvdream'"):
        evaluate(pipe, [0])


def test_an_evaluation_covers_all_views_of_all_identities(evaluation: Evaluation) -> None:
    assert (evaluation.identities, evaluation.views) == (2, 4)
    assert evaluation.summaries().keys() == FIGURES
    for name, summary in evaluation.summaries().items():
        assert summary.min <= summary.mean <= summary.max, name
    assert evaluation.silhouette_iou.min >= 0 and evaluation.silhouette_iou.max <= 1
    assert [row.shape for row in evaluation.rows] == [(9, SIZE_PX, SIZE_PX, 3)] * 2
    np.testing.assert_array_equal(np.concatenate([row[5:] for row in evaluation.rows]), truths(range(2)))
    np.testing.assert_array_equal(evaluation.rows[1][0], composite(held_out_subject(1, size_px=SIZE_PX).reference))


def test_the_figures_of_the_views_are_those_of_the_rows(evaluation: Evaluation) -> None:
    generated, truth = (np.concatenate([row[part] for row in evaluation.rows]) for part in (slice(1, 5), slice(5, None)))
    psnr_db, ssim = figures(generated, truth)
    assert_summarises(evaluation.psnr_db, psnr_db)
    assert_summarises(evaluation.ssim, ssim)
    silhouettes, true_silhouettes = ((255 - x.astype(int)).max(axis=-1) > 0.05 * 255 for x in (generated, truth))
    both, either = silhouettes & true_silhouettes, silhouettes | true_silhouettes
    assert_summarises(evaluation.silhouette_iou, both.sum(axis=(1, 2)) / either.sum(axis=(1, 2)))


def test_the_figures_of_copies_are_those_of_the_reference_against_every_view(evaluation: Evaluation) -> None:
    references = [composite(held_out_subject(identity, size_px=SIZE_PX).reference) for identity in range(2)]
    psnr_db, ssim = figures(np.repeat(np.stack(references), 4, axis=0), truths(range(2)))
    assert_summarises(evaluation.copy_psnr_db, psnr_db)
    assert_summarises(evaluation.copy_ssim, ssim)


def test_the_figures_of_the_vae_are_those_of_the_true_views_encoded_and_decoded(
    pipeline: Pipeline[Any], evaluation: Evaluation
) -> None:
    truth = truths(range(2))
    psnr_db, ssim = figures(from_model(pipeline.model.decode(pipeline.model.encode_latents(to_model(truth)))), truth)
    assert_summarises(evaluation.vae_psnr_db, psnr_db)
    assert_summarises(evaluation.vae_ssim, ssim)


def test_the_face_is_where_the_renderer_says_so_in_views_from_the_front() -> None:
    subject = held_out_subject(0, size_px=48, views=8)  # azimuths 45, 90, ... 315, 0
    parts = render(0, subject.cameras, size_px=48).parts
    faces = [Part.SKIN, Part.EYE, Part.BROW, Part.MOUTH, Part.NOSE, Part.GLASSES, Part.BEARD]
    for view, (face, part) in enumerate(zip(subject.face, parts, strict=True)):
        expected = np.isin(part, faces) if view in (0, 6, 7) else np.zeros_like(face)
        np.testing.assert_array_equal(face, expected)
    assert subject.face[7].any()


def test_eyes_and_mouths_have_a_rim_in_views_from_the_front_that_show_them() -> None:
    subject = held_out_subject(2, size_px=64, views=8)
    parts = render(2, subject.cameras, size_px=64).parts
    for masks, part in ((subject.eyes, Part.EYE), (subject.mouth, Part.MOUTH)):
        shown = [view for view in (0, 6, 7) if (parts[view] == part).sum() >= 8]
        assert 7 in shown  # the one from the front
        for view, mask in enumerate(masks):
            near = ndimage.binary_dilation(parts[view] == part, np.ones((5, 5))) if view in shown else np.zeros_like(mask)
            np.testing.assert_array_equal(mask, near)


def test_the_contrast_of_eyes_and_mouths_is_that_of_the_rows(pipeline: Pipeline[Any]) -> None:
    evaluation = evaluate(pipeline, [2], views=8, steps=1)
    subject, rows = held_out_subject(2, size_px=SIZE_PX, views=8), evaluation.rows[0]
    for name, mask in (("eye_contrast", subject.eyes), ("mouth_contrast", subject.mouth)):
        seen = mask.any(axis=(1, 2))
        for prefix, made in (("", rows[1:9]), ("copy_", np.repeat(rows[:1], 8, axis=0))):
            summary = getattr(evaluation, prefix + name)
            assert (summary is None) == (not seen.any())
            if seen.any():
                assert_summarises(summary, contrast(made[seen], rows[9:][seen], mask=mask[seen]))
    assert evaluation.eye_contrast is not None


def test_the_figures_of_faces_count_pixels_of_faces_alone(evaluation: Evaluation) -> None:
    subjects = [held_out_subject(identity, size_px=SIZE_PX) for identity in range(2)]
    pictures = {"face_psnr_db": [row[1:5] for row in evaluation.rows]}
    pictures["copy_face_psnr_db"] = [np.repeat(row[:1], 4, axis=0) for row in evaluation.rows]
    for name, made in pictures.items():
        squares = [
            ((view[face].astype(float) - composite(truth)[face]) ** 2).mean()
            for subject, views in zip(subjects, made, strict=True)
            for view, truth, face in zip(views, subject.truth, subject.face, strict=True)
            if face.any()
        ]
        assert len(squares) == 4  # of each head the views from 45 and 315 degrees
        assert_summarises(getattr(evaluation, name), 10 * np.log10(255**2 / np.asarray(squares)))


def test_any_number_of_views_can_be_evaluated(pipeline: Pipeline[Any]) -> None:
    for count, neighbours in ((1, False), (3, False), (6, True)):
        result = evaluate(pipeline, range(1), views=count, steps=1)
        assert result.views == count and result.rows[0].shape[0] == 1 + 2 * count
        assert (result.consistency_psnr_db is not None) == neighbours  # of views at most 100 degrees apart


class Noted(Pipeline[Any]):
    """Keeps the options and the views of every call."""

    def __init__(self, model: Any) -> None:
        super().__init__(model, name="noted")
        self.options: list[dict[str, Any]] = []
        self.images: list[NDArray[np.uint8]] = []

    def generate(self, image: Any = None, **options: Any) -> Any:
        views = super().generate(image, **options)
        self.options.append(options)
        self.images.append(views.images)
        return views


def test_the_same_views_can_be_generated_a_few_at_a_time(pipeline: Pipeline[Any]) -> None:
    noted, subject = Noted(pipeline.model), held_out_subject(5, size_px=SIZE_PX)
    result = evaluate(noted, [5], together=3, steps=1, normals=True)
    assert [len(images) for images in noted.images] == [3, 1]
    for name, expected in (("cameras", subject.cameras), ("normals", subject.normals)):
        np.testing.assert_array_equal(np.concatenate([options[name] for options in noted.options]), expected)
    np.testing.assert_array_equal(result.rows[0][1:5], np.concatenate(noted.images))
    np.testing.assert_array_equal(result.rows[0][5:], composite(subject.truth))


@pytest.mark.parametrize("together", [0, -1, 2.5])
def test_numbers_of_views_together_that_are_not_allowed_are_refused(pipeline: Pipeline[Any], together: Any) -> None:
    with pytest.raises(OptionError) as caught:
        evaluate(pipeline, range(1), together=together)
    assert caught.value.name == "together"


@pytest.mark.parametrize("views", [0, -1, 65, 2.5, True])
def test_numbers_of_views_that_are_not_allowed_are_refused(pipeline: Pipeline[Any], views: Any) -> None:
    with pytest.raises(OptionError) as caught:
        evaluate(pipeline, range(1), views=views)
    assert caught.value.name == "views"


def test_true_views_get_the_best_figures(pipeline: Pipeline[Any]) -> None:
    result = evaluate(Oracle(pipeline.model), range(2))
    assert result.psnr_db == Summary(mean=np.inf, std=0.0, min=np.inf, max=np.inf)
    assert result.ssim == result.silhouette_iou == pytest.approx((1.0, 0.0, 1.0, 1.0))


def test_true_views_are_recognised_and_as_consistent_as_the_truth(pipeline: Pipeline[Any]) -> None:
    result = evaluate(Oracle(pipeline.model), range(2))
    assert result.shares() == {"identity_agreement": 1.0, "camera_agreement": 1.0}
    assert result.consistency_psnr_db == result.truth_consistency_psnr_db
    assert result.consistency_ssim == result.truth_consistency_ssim
    assert result.consistency_psnr_db is not None and result.copy_consistency_psnr_db is not None
    assert result.consistency_psnr_db.mean > result.copy_consistency_psnr_db.mean + 3


class Mistaken(Oracle):
    """Gives the true views of the other head of two."""

    def generate(self, image: Any = None, **options: Any) -> Any:
        identity = len(self.options)
        views = super().generate(image, **options)
        views.images = composite(held_out_subject(1 - identity, size_px=len(image)).truth)
        return views


class Turned(Oracle):
    """Gives the true views with the first two exchanged."""

    def generate(self, image: Any = None, **options: Any) -> Any:
        views = super().generate(image, **options)
        views.images = views.images[[1, 0, 2, 3]]
        return views


def test_views_of_another_head_are_recognised_as_that_ones(pipeline: Pipeline[Any]) -> None:
    assert evaluate(Mistaken(pipeline.model), range(2)).identity_agreement == 0


def test_views_from_another_camera_are_recognised_as_that_ones(pipeline: Pipeline[Any]) -> None:
    result = evaluate(Turned(pipeline.model), range(2))
    assert result.camera_agreement == 0.5
    assert result.consistency_psnr_db is not None and result.truth_consistency_psnr_db is not None
    assert result.consistency_psnr_db.mean < result.truth_consistency_psnr_db.mean - 3


def test_silhouettes_are_compared_with_the_normal_maps_that_were_given(pipeline: Pipeline[Any]) -> None:
    result = evaluate(Oracle(pipeline.model), range(2), normals=True)
    assert result.normals_iou is not None and result.normals_iou.mean > 0.9
    wrong = evaluate(Turned(pipeline.model), range(2), normals=True)
    assert wrong.normals_iou is not None and wrong.normals_iou.mean < result.normals_iou.mean


def test_options_reach_the_pipeline(pipeline: Pipeline[Any]) -> None:
    oracle = Oracle(pipeline.model)
    evaluate(oracle, range(2), steps=3, guidance=1.5, seed=8, normals=True, prompt="a head", negative_prompt="hats")
    for identity, options in enumerate(oracle.options):
        assert (options["steps"], options["guidance"], options["seed"]) == (3, 1.5, 8)
        assert (options["prompt"], options["negative_prompt"]) == ("a head", "hats")
        np.testing.assert_array_equal(options["normals"], held_out_subject(identity, size_px=SIZE_PX).normals)
    evaluate(oracle := Oracle(pipeline.model), range(1))
    assert [oracle.options[0][name] for name in ("steps", "guidance", "seed", "normals")] == [None, None, 0, None]
    assert [oracle.options[0][name] for name in ("prompt", "negative_prompt")] == [None, None]


def test_another_picture_size_of_the_model_is_the_size_of_the_evaluation(tmp_path: Path) -> None:
    config = replace(TINY_MODEL, defaults=replace(TINY_MODEL.defaults, size_px=48))
    pipeline = load(write_tiny_model(tmp_path, config), backend="torch", device="cpu")
    result = evaluate(pipeline, [7], steps=1, normals=True)
    assert result.identities == 1 and result.rows[0].shape == (9, 48, 48, 3)
    assert np.isfinite(result.psnr_db.mean)


def test_normal_maps_for_a_model_that_takes_none_are_refused(tmp_path: Path) -> None:
    config = replace(TINY_MODEL, unet=replace(TINY_MODEL.unet, in_channels=4))
    recorded = record(load(write_tiny_model(tmp_path, config), backend="torch", device="cpu"))
    with pytest.raises(OptionError, match="takes no normal maps") as caught:
        evaluate(recorded.pipeline, range(1), normals=True)
    assert caught.value.name == "normals"
    assert not recorded.model.calls


@pytest.mark.parametrize("identities", [range(0), [], ()])
def test_an_evaluation_of_no_heads_is_refused(pipeline: Pipeline[Any], identities: Any) -> None:
    with pytest.raises(OptionError) as caught:
        evaluate(pipeline, identities)
    assert caught.value.name == "identities"
