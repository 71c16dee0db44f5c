"""The program of the demo model's last stage: what it learns from, what it counts, and that it changes the decoder alone."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import program_of_the_demo_model
from safetensors.numpy import load_file

import mvtorch
from mvshared.embedded import embedded_folder
from mvshared.heads import Part
from mvshared.metrics import contrast

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def program() -> Any:
    return program_of_the_demo_model("sharpen")


def test_what_contrast_a_picture_lacks_is_that_of_the_metric(program: Any) -> None:
    random = np.random.default_rng(0)
    truth, made = (random.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8) for _ in range(2))
    place = random.random((3, 16, 16)) < 0.3
    pixels, error = (torch.from_numpy(each.astype(np.float32) / 127.5) for each in (truth, made.astype(np.float32) - truth))
    found = program.excess(error, pixels, torch.from_numpy(place.astype(np.float32))[..., None])
    np.testing.assert_allclose(found.numpy(), contrast(made, truth, mask=place) - 1, rtol=1e-4)


def test_contrast_that_is_missing_costs_more_than_as_much_that_is_too_much(program: Any) -> None:
    """A stand-in for the decoder gives pictures with half and with half more of the contrast; one of the four shows no eyes."""
    random = torch.Generator().manual_seed(0)
    pixels, nowhere = torch.rand((4, 16, 16, 3), generator=random) - 0.5, torch.zeros(4, 16, 16)
    eyes = (torch.rand((4, 16, 16), generator=random) < 0.3).float() * torch.tensor([0, 1, 1, 1])[:, None, None]
    vae = SimpleNamespace(decode=lambda x: x, unscale_latents=lambda x: x, config=SimpleNamespace(downscale=8))

    def cost(contrast: float, **places: torch.Tensor) -> float:
        places = {"eyes": nowhere, "mouth": nowhere} | places
        return program.loss(vae, program.Pairs(contrast * pixels, pixels, nowhere, nowhere, **places)).item()

    for place in ("eyes", "mouth"):
        lost = [cost(contrast, **{place: eyes}) - cost(contrast) for contrast in (0.5, 1.0, 1.5)]
        np.testing.assert_allclose(lost, [0.75 * 0.25, 0, 0.75 * 0.25 * program.TOO_MUCH], atol=1e-5)


def test_the_decoder_alone_learns_from_latents_of_the_model_and_of_the_truth(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"HEADS": range(800_004, 800_007), "HELD_OUT": 1, "SEEDS": (1,), "STEPS": 2, "BATCH": 2}.items():
        monkeypatch.setattr(program, name, value)
    model = embedded_folder("demo")
    program.main(model, tmp_path / "pairs", tmp_path / "out")
    said = capfd.readouterr().out
    assert "seed 1, before: loss of held-out heads" in said and "seed 1, after:" in said

    files = sorted((tmp_path / "pairs").iterdir())
    assert [file.name for file in files] == ["head_800004.npz", "head_800005.npz", "head_800006.npz"]
    latents, pairs = program.read_pairs(files)
    assert latents.shape == (12, 2, 16, 16, 8) and pairs.pixels.shape == (12, 128, 128, 3)
    assert pairs.mouth.any((1, 2)).any() and not pairs.mouth.any((1, 2)).all()
    assert set(np.unique(np.load(files[0])["parts"])) <= {part.value for part in Part}
    pipeline = mvtorch.load(str(model), dtype="float32", device="cpu")
    decoded = pipeline.model.decode(pipeline.model.from_numpy(latents[:, 1]))
    assert np.abs(decoded - pairs.pixels).mean() < 0.05, "true latents are those of the true pictures"

    before, after = (load_file(folder / "vae" / WEIGHTS) for folder in (model, tmp_path / "out"))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed and all(name.startswith(("decoder.", "post_quant_conv.")) for name in changed)
    assert {array.dtype for array in after.values()} == {np.dtype(np.float16)}
    times = [file.stat().st_mtime_ns for file in files]
    program.main(model, tmp_path / "pairs", tmp_path / "again")
    assert [file.stat().st_mtime_ns for file in files] == times, "pairs that are there are taken"

    decoders = []
    for share in (0.0, 1.0):
        monkeypatch.setattr(program, "TRUE_SHARE", share)
        decoders.append(program.sharpen(model, latents, pairs, pairs, seed=1))
    assert any((decoders[0][name] != decoders[1][name]).any() for name in changed), "both latents are learned from"
