"""The demo model's last stage, its decoder on what its U-Net makes: `python sharpen.py MODEL PAIRS OUT`, all of them folders.

A U-Net that is not sure where a mouth ends makes latents between those of the possible mouths, and a decoder that has only seen
latents of true pictures draws a blur. This one learns from generated latents, beside true ones, and is asked for the contrast
of eyes and mouths (`mvshared.metrics.contrast`) as well as for small errors, which alone would leave them paler still.

PAIRS gets the latents and the true pictures of 500 heads, four views each, in 2 seconds a head and CPU core; a call that was
interrupted goes on. OUT is MODEL with the mean of the decoders of both SEEDS.
"""

import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch import Tensor
from tqdm import tqdm, trange

import mvtorch
from mvshared.camera import orbit
from mvshared.checkpoint import WEIGHT_FILE, read_vae_config, write_component
from mvshared.evaluation import rimmed
from mvshared.heads import DEFAULT_RADIUS, Part, render
from mvshared.heads.dataset import detail_maps
from mvshared.images import composite, to_model
from mvshared.training.config import OptimizerConfig, VAELossConfig
from mvshared.training.loop import learning_rate
from mvtorch.model import set_weights
from mvtorch.train import Trainer, picture_loss
from mvtorch.vae import AutoencoderKL

HEADS = range(800_000, 800_500)
HELD_OUT = 100  # of the heads, the first ones
SEEDS = (1, 2)
STEPS, BATCH = 400, 16
TRUE_SHARE = 0.35  # of the latents
TOO_MUCH = 0.3  # what exaggerated contrast costs beside as much that is missing
OPTIMIZER = OptimizerConfig(learning_rate=3e-4, final_learning_rate=1e-6, warmup_steps=30, weight_decay=0.0, ema_decay=0.995)
LOSS = VAELossConfig(mse_weight=12.0, border_weight=12.0, detail_weight=10.0)


class Pairs(NamedTuple):
    """Latents (n, h, w, c) as a model has them, and what they are to become, (n, 8 h, 8 w, 3) in [-1, 1]; the subject's alpha
    and its details, in [0, 1], and where its eyes and its mouth are, 0 or 1, (n, 8 h, 8 w)."""

    latents: Any
    pixels: Any
    foreground: Any
    detail: Any
    eyes: Any
    mouth: Any


def make_pairs(pipeline: Any, number: int) -> dict[str, NDArray[Any]]:
    """Four views of a head: `latents` (4, 2, h, w, c), the generated and the true ones, `rgba` and `parts` as rendered.

    Half of the heads are seen from the model's own azimuths, half from any four that are as far apart; half of each a bit off.
    """
    random = np.random.default_rng([991, number])
    start = 45.0 if number // 2 % 2 else random.uniform(0, 90)
    off = random.uniform(-8, 8, 4) if number // 4 % 2 else np.zeros(4)
    cameras = orbit(start + 90.0 * np.arange(4) + off, float(random.uniform(-2, 24)), radius=DEFAULT_RADIUS)
    front = orbit([float(random.uniform(-25, 25))], float(random.uniform(0, 20)), radius=DEFAULT_RADIUS)
    shown = render(number, np.concatenate([front, cameras]), size_px=pipeline.model.config.defaults.size_px)
    made = pipeline.generate(shown.rgba[0], cameras=cameras, seed=int(random.integers(1 << 30))).latents
    true = pipeline.model.to_numpy(pipeline.model.encode_latents(to_model(composite(shown.rgba[1:]))))
    return {"latents": np.stack([made, true], 1), "rgba": shown.rgba[1:], "parts": shown.parts[1:]}


def read_pairs(files: list[Path]) -> tuple[NDArray[np.float32], Pairs]:
    """Both latents of the views, and all else of their pairs."""
    arrays = [dict(np.load(file)) for file in files]
    latents, rgba, parts = (np.concatenate([each[name] for each in arrays]) for name in ("latents", "rgba", "parts"))
    alpha, detail = (values.astype(np.float32) / 255 for values in (rgba[..., 3], detail_maps(parts)))
    places = (rimmed(parts == part).astype(np.float32) for part in (Part.EYE, Part.MOUTH))
    return latents, Pairs(latents[:, 0], to_model(composite(rgba)), alpha, detail, *places)


def loss(vae: AutoencoderKL, batch: Any) -> Tensor:
    """The VAE's, without its KL, and what eyes and mouths lack of their contrast, or have too much, squared."""
    error = vae.decode(vae.unscale_latents(batch.latents)).float() - batch.pixels
    total = picture_loss(error, batch.foreground, batch.detail, LOSS, downscale=vae.config.downscale)
    for place in (batch.eyes, batch.mouth):
        there = place.sum((1, 2)) > 0
        missing = -excess(error[there], batch.pixels[there], place[there][..., None])
        total = total + (torch.where(missing > 0, 1.0, TOO_MUCH) * missing.square()).sum() / len(error)
    return total


def excess(error: Tensor, pixels: Tensor, place: Tensor) -> Tensor:
    """How much more contrast than the true `pixels` (n, h, w, 3) pictures with this error have in a place (n, h, w, 1), as a
    share, (n,): `mvshared.metrics.contrast` less one."""
    mean = (place * pixels).sum((1, 2), keepdim=True) / place.sum((1, 2), keepdim=True)
    true = place * (pixels - mean)
    return (error * true).sum((1, 2, 3)) / true.square().sum((1, 2, 3))


def sharpen(
    model: Path, latents: NDArray[np.float32], pairs: Pairs, held_out: Pairs, *, seed: int
) -> dict[str, NDArray[np.float32]]:
    """The VAE of a model with a new decoder, learned from what `read_pairs` gives. Tells the loss of the held-out pairs before
    and after."""
    network = AutoencoderKL(read_vae_config(model))
    set_weights(network, load_file(model / "vae" / WEIGHT_FILE))
    trainer = Trainer(network, loss, OPTIMIZER, frozen=("encoder.", "quant_conv."), device="cpu")
    random = np.random.default_rng(seed)

    def show(when: str) -> None:
        starts = range(0, len(held_out.pixels), BATCH)
        parts = [Pairs(*(array[at : at + BATCH] for array in held_out)) for at in starts]
        tqdm.write(f"seed {seed}, {when}: loss of held-out heads {np.mean([trainer.evaluate(part) for part in parts]):.4f}")

    show("before")
    order = np.empty(0, int)
    for step in trange(STEPS, desc=f"seed {seed}"):
        if len(order) < BATCH:
            order = random.permutation(len(latents))
        chosen, order = np.sort(order[:BATCH]), order[BATCH:]
        batch = Pairs(*(array[chosen] for array in pairs))
        kind = (random.random(BATCH) < TRUE_SHARE).astype(int)
        batch = batch._replace(latents=latents[chosen, kind])
        trainer.step(batch, learning_rate=learning_rate(OPTIMIZER, step=step, steps=STEPS))
    show("after")
    return trainer.ema_weights()


def main(model: Path, folder: Path, out: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"head_{number}.npz" for number in HEADS]
    pipeline = mvtorch.load(str(model), dtype="float32", device="cpu")
    for number, file in zip(HEADS, tqdm(files, desc="pairs"), strict=True):
        if not file.exists():
            partial = file.with_suffix(".partial.npz")
            np.savez_compressed(partial, **make_pairs(pipeline, number))  # pyright: ignore[reportArgumentType]
            partial.rename(file)
    _, held_out = read_pairs(files[:HELD_OUT])
    latents, pairs = read_pairs(files[HELD_OUT:])
    decoders = [sharpen(model, latents, pairs, held_out, seed=seed) for seed in SEEDS]
    shutil.copytree(model, out)
    mean = {name: np.mean([each[name] for each in decoders], axis=0).astype(np.float16) for name in decoders[0]}
    write_component(out, "vae", read_vae_config(model), mean)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    if Path(sys.argv[3]).exists():
        sys.exit(f"{sys.argv[3]} is there already")
    main(*map(Path, sys.argv[1:]))
