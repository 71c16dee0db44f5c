"""All of GAF on small random weights: a picture and normal maps to views, and the latent upscaler to twice their size."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import BACKENDS, assert_close, normal_maps
from PIL import Image
from upscalers import diffusers_pipeline

from mvshared.backend import load_upscaler
from mvshared.cli import run
from mvshared.conversion.gaf import init_gaf

FIXTURES = Path(__file__).parent / "fixtures"
PICTURE = FIXTURES / "tiny-imagedream" / "input.png"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GAF model, an upscaler with text that shares its VAE, and four normal maps."""
    path = tmp_path_factory.mktemp("models")
    init_gaf(FIXTURES / "tiny-imagedream", path / "gaf")
    diffusers_pipeline().save_pretrained(path / "x2")
    shutil.rmtree(path / "x2" / "vae")
    shutil.copytree(FIXTURES / "tiny-imagedream" / "vae", path / "x2" / "vae")
    (path / "maps").mkdir()
    for index, pixels in enumerate(normal_maps(4, 64)):
        Image.fromarray(pixels).save(path / "maps" / f"normal_{index:03}.png")
    return path


def test_both_backends_go_all_the_way_to_the_same_views(folders: Path, tmp_path: Path) -> None:
    latents, images = {}, {}
    for backend in BACKENDS:
        out = tmp_path / backend
        call = f"generate {PICTURE} --model {folders / 'gaf'} --backend {backend} --device cpu --dtype float32 --size 64"
        call += f" --normals {folders / 'maps'} --steps 2 --seed 3 --upscale sd-x2 --upscaler {folders / 'x2'}"
        call += " --upscale-steps 3 --upscale-guidance 4"
        assert run([*call.split(), "--prompt", "an owl", "-o", str(out)]) == 0
        latents[backend] = np.load(out / "upscaled" / "latents.npy")
        images[backend] = [np.asarray(Image.open(path)) for path in sorted((out / "upscaled").glob("view_*.png"))]
        assert np.asarray(Image.open(out / "view_000.png")).shape == (64, 64, 3)
    assert latents["torch"].shape == (4, 16, 16, 4)
    assert_close(latents["mlx"], latents["torch"], rms=1e-4)
    for ours, theirs in zip(images["mlx"], images["torch"], strict=True):
        assert ours.shape == (128, 128, 3)
        assert (np.abs(ours.astype(int) - theirs) <= 1).mean() >= 0.999


def test_the_upscaler_gets_the_prompts_of_the_run(folders: Path, tmp_path: Path) -> None:
    call = f"generate {PICTURE} --model {folders / 'gaf'} --backend torch --device cpu --size 64 --steps 1 --seed 3"
    call += f" --upscale sd-x2 --upscaler {folders / 'x2'} --upscale-steps 2 --upscale-guidance 4 -o {tmp_path / 'out'}"
    assert run([*call.split(), "--prompt", "an owl", "--negative-prompt", "blurry"]) == 0
    upscaler = load_upscaler(folders / "x2", backend="torch", device="cpu")
    small = np.load(tmp_path / "out" / "latents.npy")
    large = np.load(tmp_path / "out" / "upscaled" / "latents.npy")
    settings = {"steps": 2, "guidance": 4.0, "seed": 3}
    expected = upscaler.upscale(small, prompt="an owl", negative_prompt="blurry", **settings)  # type: ignore[arg-type]
    np.testing.assert_array_equal(large, expected)
    assert np.abs(upscaler.upscale(small, prompt="a cat", **settings) - large).max() > 1e-3  # type: ignore[arg-type]
    document = json.loads((tmp_path / "out" / "metadata.json").read_text())
    assert document["parameters"]["upscale"]["guidance"] == 4
    later = f"upscale {tmp_path / 'out'} -o {tmp_path / 'later'} --upscaler {folders / 'x2'} --upscale-steps 2"
    assert run([*later.split(), "--upscale-guidance", "4"]) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "later" / "latents.npy"), large)
