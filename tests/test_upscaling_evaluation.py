"""`mvmlx evaluate --upscaler`: every method against true renders of twice the size."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import TINY_MODEL
from PIL import Image
from upscalers import write_tiny_models

from mvshared.backend import load
from mvshared.cli import run
from mvshared.evaluation import held_out_subject
from mvshared.images import composite
from mvshared.metrics import psnr, ssim
from mvshared.upscaling.evaluation import evaluate_upscaling
from mvshared.upscaling.views import UpscaleOptions

SIZE_PX = TINY_MODEL.defaults.size_px


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_models(tmp_path_factory.mktemp("models"))


def test_lanczos_is_measured_against_the_head_at_twice_the_size(folders: Path) -> None:
    pipeline = load(folders / "tiny", backend="torch", device="cpu")
    result = evaluate_upscaling(pipeline, [3], UpscaleOptions(upscaler=folders / "x2"), seed=5)
    subject = held_out_subject(3, size_px=SIZE_PX)
    truth = composite(held_out_subject(3, size_px=2 * SIZE_PX).truth)
    views = pipeline.generate(subject.reference, cameras=subject.cameras, seed=5)
    large = np.stack([np.asarray(Image.fromarray(view).resize((64, 64), Image.Resampling.LANCZOS)) for view in views.images])
    assert result.figures["generated_lanczos_psnr_db"].mean == pytest.approx(psnr(large, truth).mean())
    assert result.figures["generated_lanczos_ssim"].mean == pytest.approx(ssim(large, truth).mean())
    upscaled = pipeline.upscale(views, upscaler=folders / "x2").images
    assert result.figures["generated_sd-x2_psnr_db"].mean == pytest.approx(psnr(upscaled, truth).mean())
    gain = psnr(upscaled, truth) - psnr(large, truth)
    assert result.figures["generated_gain_psnr_db"] == pytest.approx((gain.mean(), gain.std(), gain.min(), gain.max()))
    assert len(result.figures) == 16
    np.testing.assert_array_equal(result.rows[0][:3], np.stack([large[0], upscaled[0], truth[0]]))


def test_the_command_prints_and_writes_the_figures(folders: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--model", str(folders / "tiny"), "--backend", "torch", "--device", "cpu", "--identities", "3:5"]
    call = ["evaluate", *options, "--upscaler", str(folders / "x2"), "--upscale-steps", "1", "--upscale-noise", "0.5"]
    assert run([*call, "-o", str(tmp_path / "out")]) == 0
    assert "encoded_sd-x2_ssim" in capfd.readouterr().out
    document = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (document["upscale"]["steps"], document["upscale"]["noise_level"]) == (1, 0.5)
    assert (tmp_path / "out" / "sheet_00.png").exists()
    assert run(["evaluate", *options, "--upscaler", str(folders / "tiny")]) == 5


@pytest.mark.parametrize(
    ("option", "upscaler", "says"),
    [
        *[(option, [], "left out without --upscaler") for option in ("--upscale-steps 1", "--upscale-noise 0.5")],
        *[
            (option, ["--upscaler", "x2"], "left out with --upscaler")
            for option in (
                "--normals",
                "--views 4",
                "--views 0",
                "--together 2",
                "--scheduler ddim",
                "--spacing trailing",
                "--prompt head",
                "--negative-prompt hats",
            )
        ],
    ],
)
def test_what_has_no_effect_on_an_evaluation_is_refused(
    capfd: pytest.CaptureFixture[str], option: str, upscaler: list[str], says: str
) -> None:
    assert run(["evaluate", "--model", "nowhere", *upscaler, *option.split()]) == 2
    assert f"error: {option.split()[0]} must be {says}" in capfd.readouterr().err
