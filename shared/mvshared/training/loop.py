"""The training loop of all stages, the same for both backends: batches, steps, log, samples, checkpoints.

A run folder holds config.json (what was asked), log.csv, loss.png, samples/, state.safetensors (everything that a resumed run
needs, written whole or not at all) and model/, a checkpoint folder with the averaged weights. Killed at any moment and started
again, the run goes on from state.safetensors and ends with the same weights.
"""

import importlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from mvshared.backend import PACKAGES, choose_backend
from mvshared.captures import load_capture
from mvshared.checkpoint import (
    component_folder,
    find_model,
    read_model_config,
    read_vae_config,
    weight_files,
    write_component,
    write_model_config,
)
from mvshared.config import GenerationDefaults, ModelConfig, UNetConfig, VAEConfig
from mvshared.conversion.networks import network_shapes
from mvshared.conversion.raw import raw_tensors, write_safetensors
from mvshared.errors import NumericsError, OptionError
from mvshared.files import copy_folder
from mvshared.training.ahead import ahead
from mvshared.training.checks import check_captures, check_details, check_frozen, check_sizes
from mvshared.training.conditions import encode_conditions
from mvshared.training.config import OptimizerConfig, TrainConfig
from mvshared.training.data import (
    Latents,
    VAEPictures,
    ViewBatches,
    captures_digest,
    find_captures,
    kept_latents,
)
from mvshared.training.initial import UNET_ZEROS, initial_vae_weights, initial_weights
from mvshared.training.log import LogRow, TrainingLog
from mvshared.training.run_folder import RunFolder, sheet_path
from mvshared.training.upscaler import check_pictures_of, save_upscaler, upscaler_batches, upscaler_config, upscaler_trainer
from mvshared.training.upscaler_data import UpscalerBatches
from mvshared.weights import read_weights, sha256_of_files, short_name

HELD_OUT_SEED = 1  # added to the run's seed for the validation batches, which are the same at every step
HELD_OUT_BATCHES = 4


class Stage(NamedTuple):
    """What differs between the stages: the trainer, its batches, and how its averaged weights become a checkpoint folder.

    `held_out_batch` is None where no capture is held out.
    """

    trainer: Any
    batch: Callable[[int], Any]
    held_out_batch: Callable[[int], Any] | None
    save_model: Callable[[], None]


def learning_rate(config: OptimizerConfig, *, step: int, steps: int) -> float:
    """The rate of step 0 to steps - 1: a linear warm-up, then half a cosine down to `final_learning_rate`."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps)
    share = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * share


def train(
    config: TrainConfig,
    folder: Path | str,
    *,
    backend: str = "auto",
    device: str = "auto",
    on_sample: Callable[[Path, int], None] | None = None,
) -> Path:
    """Train until `config.steps`, from the run's last state if `folder` has one; returns the folder of the trained model.

    `on_sample(model folder, step)` is called every `config.sample_every` steps and at the end.

    Raises OutputError if `folder` holds something else, a run whose config differs in more than `run_folder.MAY_CHANGE`, one of
    more steps or one that is in training elsewhere; DatasetError for the data; NumericsError if loss or gradient leave the
    finite numbers (the last state stays).
    """
    if not isinstance(config, TrainConfig):
        raise OptionError("config", expected="a TrainConfig, such as load_train_config reads", got=type(config).__name__)
    module = importlib.import_module(f"{PACKAGES[choose_backend(backend)]}.train")
    with closing(RunFolder(folder, config)) as run, module.memory_limits(device):
        return _train(run, module, backend=backend, device=device, on_sample=on_sample)


def _train(
    run: RunFolder, module: ModuleType, *, backend: str, device: str, on_sample: Callable[[Path, int], None] | None
) -> Path:
    config, folder, state = run.config, run.path, run.last_state()
    make = {"vae": _vae_stage, "unet": _unet_stage, "upscaler": _upscaler_stage}
    stage = make[config.stage](run, module, backend=backend, device=device)
    if state is not None:
        stage.trainer.load_state(state)
        del state  # as large as the weights and the optimiser together
    first = stage.trainer.steps
    run.prepare()
    log = TrainingLog(folder, last_step=first)
    ended, due = first == config.steps, first > 0 and first % config.sample_every == 0
    if ended or (due and on_sample is not None and not sheet_path(folder, first).exists()):
        # Killed, maybe, between its last state and what follows it.
        stage.save_model()
        log.plot()
        if on_sample is not None:
            on_sample(folder / "model", first)
    losses, norms, seconds = [], [], 0.0
    started = time.perf_counter()
    with tqdm(total=config.steps, initial=first, desc=f"training {config.stage}", unit="step", disable=None) as progress:
        for step, batch in enumerate(ahead(stage.batch, range(first, config.steps)), start=first):
            rate = learning_rate(config.optimizer, step=step, steps=config.steps)
            result = stage.trainer.step(batch, learning_rate=rate)
            if result.diverged:
                what = f"loss {result.loss}, gradient norm {result.gradient_norm}"
                raise _diverged(what, run, step=step, learned=step > 0)
            losses.append(result.loss)
            if not result.skipped:
                norms.append(result.gradient_norm)
            seconds += time.perf_counter() - started  # of the steps alone, without what follows some of them
            done = step + 1
            last = done == config.steps
            progress.update()
            saves = last or done % config.checkpoint_every == 0
            sample = on_sample if last or done % config.sample_every == 0 else None
            held_out = _held_out_loss(stage) if saves else None
            if saves or sample is not None:  # the model is written, from weights that no step has seen yet
                averaged = stage.trainer.evaluate(batch) if held_out is None else held_out
                after = stage.trainer.measure(batch)
                if after.diverged or not math.isfinite(averaged):
                    what = f"loss {after.loss} and gradient norm {after.gradient_norm} after it"
                    raise _diverged(f"{what}, loss {averaged} of the averaged weights", run, step=step)
            if saves or done % config.log_every == 0:
                norm = float(np.mean(norms)) if norms else None
                scale, skipped = stage.trainer.loss_scale, len(losses) - len(norms)
                scaled = (None if scale is None else scale.scale, skipped)
                log.add(LogRow(done, float(np.mean(losses)), held_out, norm, rate, seconds / len(losses), *scaled))
                progress.set_postfix(loss=f"{np.mean(losses):.4f}")
                losses, norms, seconds = [], [], 0.0
            if saves:
                write_safetensors(run.state_path, raw_tensors(stage.trainer.state()))
                stage.save_model()
                log.plot()
            if sample is not None:
                stage.save_model()
                sample(folder / "model", done)
            started = time.perf_counter()
    return folder / "model"


def _diverged(what: str, run: RunFolder, *, step: int, learned: bool = True) -> NumericsError:
    """The error about a step; without anything `learned` the rate is not to blame."""
    in_float32 = "train in float32" * (run.config.dtype != "float32")
    if learned or run.config.init_from is None:
        hint = f"{', or '.join(filter(None, ('lower the learning rate', in_float32)))}, in another folder"
    else:
        hint = f"{', or '.join(filter(None, (in_float32, f'are the weights of {run.config.init_from} damaged')))}?"
    kept = "; the last state is kept" * run.state_path.exists()
    return NumericsError(what, where=f"training step {step}", hint=hint + kept)


def _held_out_loss(stage: Stage) -> float | None:
    if stage.held_out_batch is None:
        return None
    return float(np.mean([stage.trainer.evaluate(stage.held_out_batch(number)) for number in range(HELD_OUT_BATCHES)]))


def _vae_stage(run: RunFolder, module: ModuleType, *, backend: str, device: str) -> Stage:
    config = run.config
    assert config.vae is not None
    vae = config.vae
    training, held_out = find_captures(config.data.folder, held_out=config.data.held_out)
    captures = [load_capture(each) for each in (*training, *held_out)]
    details = config.vae_loss.detail_weight != 0
    check_sizes(captures, factor=vae.downscale, normals=config.data.normals, details=details)
    if details:
        check_details(captures, folder=config.data.folder)
    pictures, held_out_pictures = (
        VAEPictures(
            folders,
            config.data,
            latent_channels=vae.latent_channels,
            downscale=vae.downscale,
            with_detail=details,
        )
        if folders
        else None
        for folders in (training, held_out)
    )
    assert pictures is not None
    shapes = network_shapes(vae, backend=backend)
    check_frozen(config, shapes)
    weights = _initial(config, "vae", shapes)
    trainer = module.vae_trainer(
        vae,
        config.optimizer,
        config.vae_loss,
        weights,
        frozen=config.frozen,
        dtype=config.dtype,
        device=device,
        gradient_checkpointing=config.gradient_checkpointing,
    )

    def save_model() -> None:
        write_component(run.path / "model", "vae", vae, _cast(trainer.ema_weights(), config.model_dtype))

    return Stage(
        trainer,
        lambda step: pictures.batch(step, size=config.batch_size, seed=config.seed),
        _held_out(held_out_pictures, config),
        save_model,
    )


def _unet_stage(run: RunFolder, module: ModuleType, *, backend: str, device: str) -> Stage:
    config, folder = run.config, run.path
    source = _model_source(config)
    vae_source = source if config.vae_from is None else component_folder(config.vae_from)
    assert vae_source is not None
    model = _base_model(config, source, vae_source)
    unet = model.unet
    captures = find_captures(config.data.folder, held_out=config.data.held_out)
    names = [(name, folders) for name, folders in zip(("training", "held-out"), captures, strict=True) if folders]
    loaded = check_captures(names, config.data, model, with_detail=config.unet_loss.detail_weight != 0)
    if config.unet_loss.detail_weight:
        check_details(loaded, folder=config.data.folder)
    shapes = network_shapes(unet, backend=backend)
    check_frozen(config, shapes)
    weights = _initial(config, "unet", shapes, unet=unet)
    trainer = module.unet_trainer(
        unet,
        config.optimizer,
        weights,
        loss=config.unet_loss,
        frozen=config.frozen,
        dtype=config.dtype,
        device=device,
        gradient_checkpointing=config.gradient_checkpointing,
    )
    if config.unet_loss.distill_rest:
        assert config.init_from is not None
        run.teach(weight_files(component_folder(config.init_from), "unet"))
    vae, training, held_out = _latents(run, vae_source, names, backend=backend, device=device)
    model = replace(model, vae=vae)
    model = replace(model, defaults=_defaults(model, training))
    conditions = encode_conditions(source or vae_source, model, config.data, names, folder, backend=backend, device=device)
    encoded = [training] if held_out is None else [training, held_out]
    batches, *held_out_batches = (
        ViewBatches(latents, config.data, model.scheduler, normal_channels=unet.normal_channels, **given._asdict())
        for latents, given in zip(encoded, conditions, strict=True)
    )
    target = folder / "model"
    if not (target / "vae/config.json").exists():  # before the first step: a resumed run goes on in the space of these latents
        vae_weights = read_weights(weight_files(vae_source, "vae"), network_shapes(vae, backend=backend))
        write_component(target, "vae", vae, _cast(vae_weights, config.model_dtype))

    def save_model() -> None:
        if not (target / "model_index.json").exists() and source is not None and model.text_encoder is not None:
            _copy_encoders(source, target)
        write_component(target, "unet", unet, _cast(trainer.ema_weights(), config.model_dtype))
        write_model_config(target, model)

    return Stage(
        trainer,
        lambda step: batches.batch(step, size=config.batch_size, seed=config.seed),
        _held_out(held_out_batches[0] if held_out_batches else None, config),
        save_model,
    )


def _upscaler_stage(run: RunFolder, module: ModuleType, *, backend: str, device: str) -> Stage:
    config, folder = run.config, run.path
    upscaler = upscaler_config(config)
    check_pictures_of(config, upscaler)
    trainer = upscaler_trainer(config, upscaler, module, backend=backend, device=device)
    assert config.vae_from is not None
    hashes = sha256_of_files(weight_files(component_folder(config.vae_from), "vae"))
    run.learn_latents_of(hashes, config.vae_from)
    batches, held_out = upscaler_batches(config, upscaler, folder, vae=short_name(hashes), backend=backend, device=device)
    return Stage(
        trainer,
        lambda step: batches.batch(step, size=config.batch_size, seed=config.seed),
        _held_out(held_out, config),
        lambda: save_upscaler(folder / "model", config, upscaler, _cast(trainer.ema_weights(), config.model_dtype)),
    )


def _held_out(source: VAEPictures | ViewBatches | UpscalerBatches | None, config: TrainConfig) -> Callable[[int], Any] | None:
    if source is None:
        return None
    return lambda number: source.batch(number, size=config.batch_size, seed=config.seed + HELD_OUT_SEED)


def _model_source(config: TrainConfig) -> Path | None:
    """The folder whose whole model is trained on; None where the configuration says all of it."""
    return find_model(config.init_from) if config.unet is None and config.init_from is not None else None


def _base_model(config: TrainConfig, source: Path | None, vae_source: Path) -> ModelConfig:
    """What is trained: the model in `source`, or the one that the configuration describes. It puts pictures over the background
    that it learns them on, and has no negative prompt of its source: training shows no such words to be guided away from."""
    if source is not None:
        model = read_model_config(source)
        framing = replace(model.framing, background=config.data.background)
        family = model.family if config.family == "custom" else config.family
        return replace(model, framing=framing, family=family, defaults=replace(model.defaults, negative_prompt=""))
    assert config.unet is not None
    return ModelConfig(
        family=config.family,
        unet=config.unet,
        vae=read_vae_config(vae_source),
        scheduler=config.scheduler,
        camera=config.camera,
        defaults=config.defaults,
        framing=replace(config.framing, background=config.data.background),
    )


def _defaults(model: ModelConfig, latents: Latents) -> GenerationDefaults:
    """The model's defaults at the size that it is trained at, if that is a square."""
    height, width = (model.vae.downscale * side for side in latents.images.shape[1:3])
    return replace(model.defaults, size_px=height) if height == width else model.defaults


def _copy_encoders(source: Path, target: Path) -> None:
    """The folders that are not trained, as they are."""
    for name in ("text_encoder", "image_encoder", "tokenizer", "feature_extractor"):
        if (source / name).is_dir():
            copy_folder(source / name, target / name)


def _latents(
    run: RunFolder, source: Path, captures: Sequence[tuple[str, list[Path]]], *, backend: str, device: str
) -> tuple[VAEConfig, Latents, Latents | None]:
    """The VAE's config with the statistics of its latents, and the encoded captures for training and validation, if any are.

    They are kept in the run folder under the hashes of the VAE's weights and of the captures, with or without detail maps. The
    statistics are those that the run began with. Raises OutputError if it began with another VAE.
    """
    config, folder = run.config, run.path
    files = weight_files(source, "vae")
    hashes, with_detail = sha256_of_files(files), config.unet_loss.detail_weight != 0
    key = short_name(hashes) + "-detail" * with_detail
    paths = [folder / f"latents-{name}-{key}-{captures_digest(found)}.npz" for name, found in captures]
    vae = read_vae_config(source)
    raw = replace(vae, scaling_factor=1.0, latents_mean=None, latents_std=None)

    @cache
    def vae_encode() -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
        package = importlib.import_module(f"{PACKAGES[choose_backend(backend)]}.model")
        return package.load_vae(raw, files, device=device).encode

    if not all(path.exists() for path in paths):
        vae_encode()  # before the run notes a VAE that cannot be loaded
    run.learn_latents_of(hashes, source)
    training, *held_out = (
        kept_latents(
            path,
            folders,
            config.data,
            lambda pictures: vae_encode()(pictures),
            replaces=f"latents-{name}-*.npz",
            with_detail=with_detail,
        )
        for path, (name, folders) in zip(paths, captures, strict=True)
    )
    begun = folder / "model/vae/config.json"
    if begun.exists():
        vae = read_vae_config(folder / "model")
    elif vae.latents_mean is None and config.unet is not None:
        sample = training.images.reshape(-1, vae.latent_channels).astype(np.float64)
        vae = replace(vae, scaling_factor=1.0, latents_mean=_rounded(sample.mean(0)), latents_std=_rounded(sample.std(0)))
    return vae, _scaled(training, vae), _scaled(held_out[0], vae) if held_out else None


def _cast(weights: Mapping[str, NDArray[Any]], dtype: str) -> dict[str, NDArray[Any]]:
    return {name: array.astype(dtype) for name, array in weights.items()}


def _rounded(values: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(round(float(value), 6) for value in values)


def _scaled(latents: Latents, vae: VAEConfig) -> Latents:
    """Latents in the U-Net's scale; where there is no normal map they stay zero."""
    mean = np.asarray(vae.latents_mean or 0.0, np.float32)
    scale = np.float32(vae.scaling_factor) / np.asarray(vae.latents_std or 1.0, np.float32)
    present = latents.normals.any(axis=(1, 2, 3), keepdims=True)
    images = ((latents.images - mean) * scale).astype(np.float16)
    normals = np.where(present, (latents.normals - mean) * scale, 0).astype(np.float16)
    return latents._replace(images=images, normals=normals)


def _initial(
    config: TrainConfig,
    component: Literal["unet", "vae"],
    shapes: dict[str, tuple[int, ...]],
    *,
    unet: UNetConfig | None = None,
) -> dict[str, NDArray[np.float32]]:
    """Weights to start from: those of `init_from`, or random ones."""
    if config.init_from is not None:
        return read_weights(weight_files(component_folder(config.init_from), component), shapes, unet=unet)
    if component == "vae":
        return initial_vae_weights(shapes, seed=config.seed)
    return initial_weights(shapes, seed=config.seed, zeros=UNET_ZEROS)
