"""What does not fit is refused with the same words by both backends, before anything is computed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from upscalers import write_tiny_models

from mvshared.backend import load, load_upscaler
from mvshared.errors import OptionError
from mvshared.guidance import Branch

FOLDER = Path(__file__).parent / "fixtures" / "tiny-imagedream"
BRANCHES = [Branch(text=False, image=False, normals=True), Branch(text=False, image=True, normals=True)]


def refused(call: Any) -> str:
    with pytest.raises(OptionError) as caught:
        call()
    return str(caught.value)


def zeros(model: Any, *shape: int) -> Any:
    return model.from_numpy(np.zeros(shape, np.float32))


@pytest.fixture(scope="module")
def demos() -> list[Any]:
    return [load("demo", backend=backend, device="cpu", dtype="float32").model for backend in ("torch", "mlx")]


@pytest.mark.parametrize(
    ("x", "normals", "message"),
    [
        ((2, 16, 16, 8), (1, 16, 16, 8), "normals must be of shape (2, 16, 16, 8), got (1, 16, 16, 8)"),
        ((2, 16, 16, 8), (3, 16, 16, 8), "normals must be of shape (2, 16, 16, 8), got (3, 16, 16, 8)"),
        ((2, 16, 16, 8), (2, 8, 8, 8), "normals must be of shape (2, 16, 16, 8), got (2, 8, 8, 8)"),
        ((0, 16, 16, 8), None, "latents must be of shape (n, h, w, 8) with h and w multiples of 4, got (0, 16, 16, 8)"),
        ((16, 16, 8), None, "latents must be of shape (n, h, w, 8) with h and w multiples of 4, got (16, 16, 8)"),
        ((2, 18, 16, 8), None, "latents must be of shape (n, h, w, 8) with h and w multiples of 4, got (2, 18, 16, 8)"),
    ],
)
def test_latents_and_normal_maps_of_a_step(demos: list[Any], x: Any, normals: Any, message: str) -> None:
    for model in demos:
        cameras = np.zeros((2, 16), np.float32)
        reference, maps = zeros(model, 1, 16, 16, 8), None if normals is None else zeros(model, *normals)
        condition = model.condition(cameras=cameras, reference=reference, normals=maps, branches=BRANCHES)
        assert refused(lambda m=model, c=condition: m.denoise(zeros(m, *x), 500.0, c, [-0.5, 1.5])) == message


def test_weights_of_branches_may_be_numbers_of_numpy(demos: list[Any]) -> None:
    for model in demos:
        options: dict[str, Any] = {"cameras": np.zeros((2, 16), np.float32), "normals": None, "branches": BRANCHES}
        condition, x = model.condition(reference=zeros(model, 1, 16, 16, 8), **options), zeros(model, 2, 16, 16, 8)
        plain, ours = (model.to_numpy(model.denoise(x, 500.0, condition, w)) for w in ([-0.5, 1.5], np.array([-0.5, 1.5])))
        np.testing.assert_array_equal(ours, plain)


@pytest.mark.parametrize(("part", "shape"), [("encode", (1, 33, 32, 3)), ("decode", (1, 4, 4, 3))])
def test_pictures_and_latents_of_the_vae(demos: list[Any], part: str, shape: tuple[int, ...]) -> None:
    ours, theirs = (refused(lambda m=model: getattr(m.vae, part)(zeros(m, *shape))) for model in demos)
    assert ours == theirs


@pytest.mark.parametrize("ids", [[[525]], [[10**6]], [[-1]], [[1.0]]])
def test_token_ids_that_the_text_encoder_does_not_know(ids: Any) -> None:
    for backend in ("torch", "mlx"):
        model: Any = load(FOLDER, backend=backend, device="cpu", dtype="float32").model
        vocab = model.config.text_encoder.vocab_size
        message = refused(lambda m=model: m.encode_prompt(np.array(ids)))
        assert message.startswith(f"token ids must be whole numbers from 0 to {vocab - 1}, got ")


def test_latents_of_a_step_of_an_upscaler(tmp_path: Path) -> None:
    folders, messages = write_tiny_models(tmp_path), list[str]()
    for backend in ("torch", "mlx"):
        model: Any = load_upscaler(folders / "x2", backend=backend, device="cpu").model
        embedding = np.zeros(model.config.noise_channels, np.float32)
        condition = model.condition(np.zeros((2, 4, 4, 4), np.float32), embedding, text=None)
        messages.append(refused(lambda m=model, c=condition: m.denoise(zeros(m, 1, 8, 8, 4), 0.0, c, 1.0)))
    assert messages == ["latents must be of shape (2, 8, 8, 4), got (1, 8, 8, 4)"] * 2
