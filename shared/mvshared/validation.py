"""Two implementations, or two dtypes of one, on the same weights and inputs, compared block by block: `mvmlx validate`.

Each network gets the same inputs on both sides, those that this side's networks made before, so that errors add up within a
network and not from one to the next. Activations go to disk as they come: one of each side is in memory at a time.
"""

import gc
import importlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from mvshared.backend import (
    PACKAGES,
    BackendName,
    Dtype,
    Model,
    available_backends,
    check_diffusers,
    choose_backend,
    parse_dtype,
)
from mvshared.camera import camera_vectors, even_azimuths, orbit
from mvshared.checkpoint import find_model, read_model_config
from mvshared.clip_images import clip_pixels
from mvshared.config import ModelConfig, VAEConfig
from mvshared.errors import OptionError, OutputError
from mvshared.files import make_folder
from mvshared.framing import load_framed
from mvshared.guidance import ALL, Guidance
from mvshared.metrics import relative_rms
from mvshared.quantization.plans import check_preset
from mvshared.tokenizer import CLIPTokenizer
from mvshared.upscaling.folder import is_upscaler, read_upscaler_config

Against = Literal["mlx", "torch", "diffusers", "float32"]

TOLERANCES: dict[Dtype, float] = {"float32": 2e-5, "float16": 2e-2, "bfloat16": 1e-1}  # relative RMS per block
QUANTIZED_TOLERANCES = {"q8": 1e-1, "q4": 1.0}  # small networks with random weights lose half as much; trained ones far less
PROMPT = "a photo of an owl, 3d asset"
TEXTS = ("", PROMPT, "It's 2 Cafés: naïve, 猫 & <|endoftext|>!!", "one word and another " * 40)  # for the tokenizer alone
GUIDANCE = 5.0
ELEVATION_DEG = 15.0


@dataclass(frozen=True, kw_only=True)
class Check:
    """One block on both sides: the largest difference, relative to the largest value there, and the relative RMS.

    Seconds are None for what is no block: token ids and CLIP's pixels, which are compared with transformers' alone and are
    infinitely wrong or right; the scaled latents, the guided output of the U-Net, the pixels.
    """

    name: str
    shape: tuple[int, ...]
    max_error: float
    rms_error: float
    seconds: float | None
    reference_seconds: float | None


class Component(NamedTuple):
    """A network, or the half of it that runs by itself: how many blocks were compared, the last one, and the worst one."""

    name: str
    blocks: int
    output: Check
    worst: Check


@dataclass(frozen=True, kw_only=True)
class Validation:
    """All checks in the order in which the blocks ran; `unmatched` are blocks that only this side has."""

    backend: BackendName
    against: Against
    dtype: Dtype
    quantization: str | None
    tolerance: float
    checks: tuple[Check, ...]
    unmatched: tuple[str, ...]

    @property
    def first_failure(self) -> Check | None:
        """The first block that leaves the tolerance, or is not finite."""
        return next((check for check in self.checks if not check.rms_error <= self.tolerance), None)

    def components(self) -> tuple[Component, ...]:
        """The checks network by network, in the order in which they ran."""
        found: dict[str, list[Check]] = {}
        for check in self.checks:
            found.setdefault(_component(check.name), []).append(check)
        worst = {name: max(checks, key=lambda check: check.rms_error) for name, checks in found.items()}
        return tuple(Component(name, len(checks), checks[-1], worst[name]) for name, checks in found.items())


class Suite(NamedTuple):
    """How a kind of model is run: module and loader in the backends and in the twin of diffusers, inputs of a config and a
    folder, how often the reference repeats what is computed once here, and every network once."""

    backends: tuple[str, str]
    diffusers: tuple[str, str]
    inputs: Callable[[Any, Path], Any]
    frames: Callable[[Any], tuple[int, ...]]
    run: Callable[..., Any]


class Inputs(NamedTuple):
    """What the networks are given: a random sample, token ids, pictures, cameras."""

    sample: NDArray[np.float32]
    timestep: float
    cameras: NDArray[np.float32] | None
    token_ids: NDArray[np.int64] | None
    clip_pixels: NDArray[np.float32] | None
    pixels: NDArray[np.float32]


class States(NamedTuple):
    """What the first side's encoders made, for both U-Nets."""

    text: NDArray[np.float32] | None
    image: NDArray[np.float32] | None
    reference: NDArray[np.float32]


def validate(
    name: str | Path,
    *,
    against: str,
    backend: str = "auto",
    device: str = "auto",
    dtype: str | None = None,
    quantize: str | None = None,
    reference: str | Path | None = None,
    tolerance: float | None = None,
    save: Path | None = None,
) -> Validation:
    """Run the networks of a model in a backend and in `against`, the other backend or diffusers, and compare every block.

    The other side computes in float32 on the CPU, with the same weights: those of full precision if this side's are quantised
    as they are loaded, by `quantize`; what quantised ones stand for if they are stored so; or the weights of another model of
    the same networks, `reference`. "float32" is the same backend on the same device in that dtype. `tolerance` is the relative
    RMS that a block may differ by, by default of TOLERANCES, or QUANTIZED_TOLERANCES where `quantize` is given. `save` is a
    folder for the activations, `SIDE/BLOCK.npy`. Raises OptionError, BackendError and CheckpointError.
    """
    other_side = _parse_against(against)
    chosen = _backend_under_test(backend, against=other_side)
    used_dtype = parse_dtype(dtype, default="float32")
    if against == used_dtype and quantize is None and reference is None:
        raise OptionError("dtype", expected="float16 or bfloat16 for a comparison with float32", got=used_dtype)
    limit = tolerance
    if limit is None:
        limit = TOLERANCES[used_dtype]
        if quantize is not None:
            check_preset(quantize)
            limit = max(limit, QUANTIZED_TOLERANCES[quantize])
    if not 0 < limit < float("inf"):
        raise OptionError("tolerance", expected="above 0", got=tolerance)
    with ExitStack() as stack:
        folder = make_folder(save) if save else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mvmlx-")))
        recorder = _Recorder(make_folder(folder / chosen))
        suite = _suite(find_model(name))
        model = _load(suite, chosen, name, dtype=used_dtype, device=device, quantize=quantize)
        quantization = model.quantization
        if tolerance is None and reference is not None and quantization is not None:
            limit = max(limit, QUANTIZED_TOLERANCES.get(quantization.rpartition(" ")[2], max(QUANTIZED_TOLERANCES.values())))
        if reference is not None:
            _check_reference(model.config, reference)
        inputs = suite.inputs(model.config, find_model(name))
        states = suite.run(model, inputs, recorder, states=None)
        model_config = model.config
        del model
        gc.collect()
        keep = make_folder(folder / against) if save else None
        comparer = _Comparer(recorder, frames=suite.frames(inputs), keep=keep)
        side, place = (chosen, device) if other_side == "float32" else (other_side, "cpu")
        other = _load(suite, side, reference or name, dtype="float32", device=place)
        suite.run(other, inputs, comparer, states=states)
        checks = comparer.in_order()
        if against == "diffusers":
            checks = (*_input_checks(model_config, find_model(name)), *checks)
    return Validation(
        backend=chosen,
        against=other_side,
        dtype=used_dtype,
        quantization=quantization,
        tolerance=limit,
        checks=checks,
        unmatched=tuple(name for name in recorder.blocks if name not in comparer.checks),
    )


def _check_reference(config: Any, reference: str | Path) -> None:
    """Raise OptionError unless a reference has the networks of a model with this config."""
    folder = find_model(reference)
    other = read_upscaler_config(folder) if is_upscaler(folder) else read_model_config(folder)
    for name in ("unet", "vae", "text_encoder", "image_encoder"):
        ours, theirs = (getattr(each, name, None) for each in (config, other))
        if isinstance(ours, VAEConfig) and isinstance(theirs, VAEConfig):
            theirs = replace(theirs, sample_size=ours.sample_size)  # which says nothing about the network
        if ours != theirs:
            expected = f"a folder of the same networks, and its {name} is another"
            raise OptionError("reference", expected=expected, got=str(reference))


def _parse_against(name: str) -> Against:
    for against in get_args(Against):
        if name == against:
            return against
    raise OptionError("against", expected="mlx, torch, diffusers or float32", got=name)


def _backend_under_test(backend: str, *, against: Against) -> BackendName:
    if against == backend:
        raise OptionError("against", expected="another implementation than the backend", got=against)
    if against == "float32":
        return choose_backend(backend)
    if backend == "auto" and against != "diffusers":
        backend = "mlx" if against == "torch" else "torch"
    if against == "diffusers":
        check_diffusers()
    elif against not in available_backends():
        choose_backend(against)  # raises with the hint how to install it
    return choose_backend(backend)


def _component(name: str) -> str:
    """The network of a block, or of what is no block."""
    if name in ("latents", "pixels"):
        return "vae.encoder" if name == "latents" else "vae.decoder"
    network, _, block = name.partition(".")
    if network == "vae":
        return "vae.encoder" if block.startswith(("encoder", "quant_conv")) else "vae.decoder"
    return "unet.image_embed" if name.startswith("unet.image_embed") else network


def _suite(folder: Path) -> Suite:
    """How the networks in a folder are run."""
    if is_upscaler(folder):
        from mvshared.upscaling.validation import UPSCALER

        return UPSCALER
    return Suite(("model", "load_model"), ("diffusers_model", "DiffusersModel"), _inputs, _frames, _run)


def _load(
    suite: Suite,
    side: BackendName | Literal["diffusers"],
    name: str | Path,
    *,
    dtype: Dtype,
    device: str,
    quantize: str | None = None,
) -> Any:
    package, (module, loader) = (
        (PACKAGES["torch"], suite.diffusers) if side == "diffusers" else (PACKAGES[side], suite.backends)
    )
    options = {"dtype": dtype, "device": device} | ({} if quantize is None else {"quantize": quantize})
    return getattr(importlib.import_module(f"{package}.{module}"), loader)(name, **options)


def _input_checks(config: Any, folder: Path) -> Iterator[Check]:
    """What comes before the networks, against transformers: token ids of texts, and the picture of CLIP's vision tower."""
    theirs = importlib.import_module(f"{PACKAGES['torch']}.diffusers_inputs")
    if config.text_encoder is not None:
        reference = theirs.TextInputs(folder)
        texts = [*TEXTS, *(f"a {token}, and{token}" for token in reference.added)]
        tokenizer = CLIPTokenizer(folder / "tokenizer")
        expected = reference(texts, max_length=tokenizer.max_length)
        yield _input_check("tokenizer", tokenizer(texts).ids, expected, tolerance=0)
    processor = getattr(config, "image_processor", None)
    if processor is not None:
        picture = textured_picture(config.defaults.size_px)[: config.defaults.size_px * 3 // 4]
        pixels, expected = clip_pixels(picture, processor), theirs.clip_pixels(folder, picture)
        yield _input_check("image_processor", pixels, expected, tolerance=TOLERANCES["float32"])


def _input_check(name: str, actual: NDArray[Any], expected: NDArray[Any], *, tolerance: float) -> Check:
    """What leaves this tolerance is infinitely wrong, whatever the networks may do in their dtype."""
    largest, rms = _errors(actual, expected)
    if not rms <= tolerance:
        largest = rms = float("inf")
    return Check(name=name, shape=actual.shape, max_error=largest, rms_error=rms, seconds=None, reference_seconds=None)


def _inputs(config: ModelConfig, folder: Path) -> Inputs:
    defaults, rng = config.defaults, np.random.default_rng(0)
    size = defaults.size_px // config.vae.downscale
    framed = load_framed(textured_picture(defaults.size_px), size_px=defaults.size_px, framing=config.framing)
    poses = orbit(even_azimuths(defaults.views), ELEVATION_DEG, radius=config.camera.radius)
    processor = config.image_processor
    return Inputs(
        sample=rng.standard_normal((defaults.views, size, size, config.vae.latent_channels), dtype=np.float32),
        timestep=float(config.scheduler.num_train_timesteps // 2),
        cameras=camera_vectors(poses) if config.unet.camera_dim else None,
        token_ids=None if config.text_encoder is None else CLIPTokenizer(folder / "tokenizer")(["", PROMPT]).ids,
        clip_pixels=None if processor is None else clip_pixels(framed.full, processor)[None],
        pixels=framed.pixels[None],
    )


def textured_picture(size_px: int) -> NDArray[np.uint8]:
    """Gradients with texture everywhere, uint8 (size_px, size_px, 3): flat areas would leave norms little but rounding."""
    y, x = np.mgrid[:size_px, :size_px] / size_px
    texture = np.random.default_rng(1).integers(-64, 64, (size_px, size_px, 3))
    return (np.stack([x, y, 1 - x], axis=-1) * 127 + 64 + texture).astype(np.uint8)


def textured_subject(size_px: int) -> NDArray[np.uint8]:
    """A disc of such texture before nothing, uint8 (size_px, size_px, 4): a picture that no framing has a doubt about."""
    y, x = np.mgrid[:size_px, :size_px] * 2 / size_px - 1
    alpha = np.where(x**2 + y**2 < 0.9, 255, 0).astype(np.uint8)
    return np.dstack([textured_picture(size_px), alpha])


def _frames(inputs: Inputs) -> tuple[int, ...]:
    """How often the reference may compute once per frame what this project computes once: for the views, with a reference."""
    return len(inputs.sample), len(inputs.sample) + 1


def _run(model: Model[Any], inputs: Inputs, observer: Any, *, states: States | None) -> States:
    """Every network once. Without `states`, the U-Net gets those of this model's own encoders."""
    config, guided = model.config, Guidance(guidance=GUIDANCE).mixture(ALL)

    def observed(name: str, array: Any, seconds: float) -> None:
        observer(name, model.to_numpy(array), seconds)

    with model.observe(observed):
        text = None if inputs.token_ids is None else model.to_numpy(model.encode_prompt(inputs.token_ids))
        image = None if inputs.clip_pixels is None else model.to_numpy(model.encode_image(inputs.clip_pixels))
        reference = model.to_numpy(model.encode_latents(inputs.pixels))
        states = states or States(text, image, reference)
        condition = model.condition(
            text=None if states.text is None else model.from_numpy(states.text),
            image_states=None if states.image is None else model.from_numpy(states.image),
            cameras=inputs.cameras,
            reference=model.from_numpy(states.reference) if config.unet.reference_frame else None,
            normals=None,
            branches=guided.branches,
        )
        out = model.denoise(model.from_numpy(inputs.sample), inputs.timestep, condition, guided.weights)
        pixels = model.decode(model.from_numpy(states.reference))
    for name, array in (("latents", reference), ("unet.guided", model.to_numpy(out)), ("pixels", pixels)):
        observer(name, array, None)
    return states


class _Recorder:
    """Keeps activations on disk, and the blocks' shapes and times."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.blocks: dict[str, tuple[tuple[int, ...], float | None]] = {}

    def __call__(self, name: str, array: NDArray[np.float32], seconds: float | None) -> None:
        self.blocks[name] = (array.shape, seconds)
        _save(self.folder / f"{name}.npy", array)

    def load(self, name: str) -> NDArray[np.float32]:
        return np.load(self.folder / f"{name}.npy", mmap_mode="r")


def _save(path: Path, array: NDArray[np.float32]) -> None:
    """Write an array to a file, without waiting for the disk as `write_atomic` does. Raises OutputError, and leaves no part."""
    try:
        np.save(path, array)
    except OSError as cause:
        path.unlink(missing_ok=True)
        raise OutputError(f"cannot be written: {cause.strerror or cause}", path=path) from cause


class _Comparer:
    """Compares activations with recorded ones of the same name."""

    def __init__(self, recorder: _Recorder, *, frames: tuple[int, ...], keep: Path | None) -> None:
        self.recorder, self.frames, self.keep = recorder, frames, keep
        self.checks: dict[str, Check] = {}

    def __call__(self, name: str, expected: NDArray[np.float32], seconds: float | None) -> None:
        if self.keep is not None:
            _save(self.keep / f"{name}.npy", expected)
        if name not in self.recorder.blocks:
            return
        shape, own_seconds = self.recorder.blocks[name]
        max_error, rms_error = _errors(self.recorder.load(name), _once(expected, shape, frames=self.frames))
        self.checks[name] = Check(
            name=name,
            shape=shape,
            max_error=max_error,
            rms_error=rms_error,
            seconds=own_seconds,
            reference_seconds=seconds,
        )

    def in_order(self) -> tuple[Check, ...]:
        """By the order in which the recorded blocks ran."""
        return tuple(self.checks[name] for name in self.recorder.blocks if name in self.checks)


def _once(expected: NDArray[np.float32], shape: tuple[int, ...], *, frames: tuple[int, ...]) -> NDArray[np.float32]:
    """Without the repetitions of what is the same in every frame of an object."""
    for count in frames:
        if expected.shape[0] == shape[0] * count and expected.size == count * int(np.prod(shape)):
            return expected[::count]
    return expected


def _errors(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> tuple[float, float]:
    """Largest and root mean square difference, each relative to that of `expected`; infinite for another number of values.

    Tokens may be grouped differently, in the same order.
    """
    if actual.size != expected.size:
        return float("inf"), float("inf")
    a, e = actual.ravel(), expected.ravel()
    rms = relative_rms(a, e)
    if not 0 < rms < float("inf"):
        return rms, rms
    return float(np.abs(np.subtract(a, e, dtype=np.float64)).max() / np.abs(e).max()), rms
