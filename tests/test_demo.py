"""The embedded model: its size, the same views on both backends and on a GPU, and that it knows heads it has never seen."""

from pathlib import Path

import numpy as np
import pytest
from helpers import assert_close
from numpy.typing import NDArray

from mvshared.backend import load
from mvshared.camera import orbit
from mvshared.checkpoint import find_model
from mvshared.embedded import embedded_source
from mvshared.evaluation import HELD_OUT, Evaluation, evaluate, held_out_subject
from mvshared.heads import DEFAULT_RADIUS, render
from mvshared.images import load_image
from mvshared.runs import Views

MAX_BYTES = 20_000_000
SUBJECT = 11  # below HELD_OUT: never rendered for training
STEPS = 4
LATENTS_RMS = 1e-3  # four steps of float32 rounding, from a model whose weights are float16
GPU_LATENTS_RMS = 3e-2  # the same through float16 or TF32 products


def generate(
    backend: str, *, normals: bool = False, guidance: float = 1.0, dtype: str = "float32", device: str = "cpu"
) -> Views:
    subject = held_out_subject(SUBJECT, size_px=128)
    return load("demo", backend=backend, dtype=dtype, device=device).generate(
        subject.reference,
        cameras=subject.cameras,
        normals=list(subject.normals) if normals else None,
        steps=STEPS,
        guidance=guidance,
    )


def largest_level(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> int:
    return int(np.abs(a.astype(np.int16) - b).max())


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    return evaluate(load("demo", backend="torch", device="cpu"), range(8), steps=STEPS)


def test_the_weights_fit_into_the_package() -> None:
    assert sum(path.stat().st_size for path in embedded_source("demo").rglob("*") if path.is_file()) <= MAX_BYTES


def test_the_card_says_what_a_user_must_know() -> None:
    card = (find_model("demo") / "README.md").read_text(encoding="utf-8")
    for topic in ("Data", "Recipe", "Steps", "Machine", "Metrics", "Limits", "Seed", "Retrain", "photograph"):
        assert topic in card, topic


@pytest.mark.parametrize(("normals", "guidance"), [(False, 1.0), (True, 1.0), (False, 2.0)])
def test_both_backends_generate_the_same_views(normals: bool, guidance: float) -> None:
    torch_views, mlx_views = (generate(backend, normals=normals, guidance=guidance) for backend in ("torch", "mlx"))
    assert_close(mlx_views.latents, torch_views.latents, rms=LATENTS_RMS)
    assert largest_level(mlx_views.images, torch_views.images) <= 1


@pytest.mark.gpu("cuda")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_cuda_generates_what_the_cpu_does(dtype: str) -> None:
    rms = GPU_LATENTS_RMS * (8 if dtype == "bfloat16" else 1)
    assert_close(generate("torch", dtype=dtype, device="cuda").latents, generate("torch").latents, rms=rms)


@pytest.mark.gpu("metal")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_metal_generates_what_the_cpu_does(dtype: str) -> None:
    rms = GPU_LATENTS_RMS * (8 if dtype == "bfloat16" else 1)
    assert_close(generate("mlx", dtype=dtype, device="gpu").latents, generate("torch").latents, rms=rms)


def test_unseen_heads_come_out_far_better_than_a_copy_of_the_picture(evaluation: Evaluation) -> None:
    assert evaluation.psnr_db.mean >= evaluation.copy_psnr_db.mean + 3
    assert evaluation.ssim.mean > evaluation.copy_ssim.mean
    assert evaluation.silhouette_iou.mean >= 0.85


def test_the_vae_keeps_unseen_heads(evaluation: Evaluation) -> None:
    assert evaluation.vae_psnr_db.mean >= 27


def test_normal_maps_make_the_views_better(evaluation: Evaluation) -> None:
    guided = evaluate(load("demo", backend="torch", device="cpu"), range(8), steps=STEPS, normals=True)
    assert guided.psnr_db.mean > evaluation.psnr_db.mean + 0.5
    assert guided.silhouette_iou.mean > evaluation.silhouette_iou.mean
    assert guided.normals_iou is not None and guided.normals_iou.mean >= 0.95


def test_each_head_gets_its_own_views(evaluation: Evaluation) -> None:
    """Against the truth of the next head the pictures fit much worse: the model looks at its reference."""
    views = evaluation.views
    generated, truth = (np.stack([row[first : first + views] for row in evaluation.rows]) for first in (1, 1 + views))
    own, other = (
        np.mean((generated.astype(np.float64) - np.roll(truth, shift, axis=0)) ** 2, axis=(1, 2, 3, 4)) for shift in (0, 1)
    )
    assert np.mean(own) < 0.5 * np.mean(other)
    assert np.mean(own < other) >= 0.75


def test_every_head_and_camera_is_recognised(evaluation: Evaluation) -> None:
    assert evaluation.identity_agreement == 1
    assert evaluation.camera_agreement >= 0.95


def test_the_views_are_far_more_consistent_than_a_copied_picture(evaluation: Evaluation) -> None:
    generated, copies = evaluation.consistency_psnr_db, evaluation.copy_consistency_psnr_db
    assert generated is not None and copies is not None
    assert generated.mean >= copies.mean + 3


def test_the_example_picture_is_a_head_that_was_held_out() -> None:
    picture = load_image(Path(__file__).parents[1] / "examples" / "portrait.png")
    rendered = render(SUBJECT, orbit([8], 6, radius=DEFAULT_RADIUS), size_px=256).rgba[0]
    assert SUBJECT < HELD_OUT
    assert np.abs(picture.astype(np.int16) - rendered).mean() < 0.1
