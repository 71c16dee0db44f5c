"""The embedded upscaler of the demo model: its size, the same pictures on both backends, and that it beats interpolation."""

import numpy as np
import pytest
from helpers import assert_close

from mvshared.backend import load, load_upscaler
from mvshared.checkpoint import find_model
from mvshared.cli import run
from mvshared.evaluation import held_out_subject
from mvshared.heads import composite
from mvshared.images import from_model, to_model
from mvshared.upscaling.evaluation import UpscaleEvaluation, evaluate_upscaling
from mvshared.upscaling.views import UpscaleOptions

MAX_BYTES = 8_000_000


@pytest.fixture(scope="module")
def evaluation() -> UpscaleEvaluation:
    return evaluate_upscaling(load("demo", backend="torch", device="cpu"), range(8), UpscaleOptions(upscaler="demo-x2"))


def test_the_weights_fit_into_the_package() -> None:
    folder = find_model("demo-x2")
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= MAX_BYTES
    card = (folder / "README.md").read_text(encoding="utf-8")
    for topic in ("Data", "Recipe", "Steps", "Machine", "Metrics", "Limits", "Retrain"):
        assert topic in card, topic


def test_it_keeps_the_true_views_of_unseen_heads_better_than_lanczos(evaluation: UpscaleEvaluation) -> None:
    figures = evaluation.figures
    assert figures["encoded_sd-x2_psnr_db"].mean > figures["encoded_lanczos_psnr_db"].mean
    assert figures["encoded_sd-x2_ssim"].mean > figures["encoded_lanczos_ssim"].mean
    assert figures["encoded_lanczos_psnr_db"].mean > figures["encoded_bilinear_psnr_db"].mean + 3


def test_it_brings_generated_views_nearer_to_the_truth_than_lanczos(evaluation: UpscaleEvaluation) -> None:
    figures = evaluation.figures
    assert figures["generated_sd-x2_psnr_db"].mean > figures["generated_lanczos_psnr_db"].mean
    assert figures["generated_sd-x2_ssim"].mean > figures["generated_lanczos_ssim"].mean


def test_both_backends_make_the_same_pictures() -> None:
    truth = to_model(composite(held_out_subject(11, size_px=128).truth[:2]))
    latents, images = {}, {}
    for backend in ("torch", "mlx"):
        upscaler = load_upscaler("demo-x2", backend=backend, device="cpu", dtype="float32")
        model = upscaler.model
        low = model.to_numpy(model.encode_latents(truth))
        latents[backend] = upscaler.upscale(low, seed=5)
        images[backend] = from_model(model.decode(model.from_numpy(latents[backend])))
    assert_close(latents["mlx"], latents["torch"], rms=1e-3)
    assert np.abs(images["mlx"].astype(int) - images["torch"]).max() <= 1


def test_it_is_what_the_demo_model_takes_by_itself(tmp_path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "examples/portrait.png", "--steps", "1", "--upscale", "sd-x2", "-o", str(tmp_path / "out")]) == 0
    assert run(["upscale", str(tmp_path / "out"), "-o", str(tmp_path / "again")]) == 0
    first, second = (np.load(folder / "latents.npy") for folder in (tmp_path / "out" / "upscaled", tmp_path / "again"))
    np.testing.assert_array_equal(first, second)
    assert run(["models"]) == 0
    assert "demo-x2: upscales the latents of demo" in capfd.readouterr().out
