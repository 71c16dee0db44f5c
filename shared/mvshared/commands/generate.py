"""`mvmlx generate`."""

import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from mvshared.backend import Model, choose_backend, chosen_dtype, load
from mvshared.camera import load_cameras, other_lenses
from mvshared.checkpoint import find_model, read_model_config
from mvshared.config import ModelConfig
from mvshared.errors import MvError, MvWarning, OptionError, OutputError, warn
from mvshared.export import METADATA, check_free, check_source
from mvshared.files import check_folder, make_folder, remove_others, write_atomic
from mvshared.images import encode_png, grid
from mvshared.messages import print_json, say
from mvshared.numbers import number
from mvshared.pipeline import Pipeline, Progress
from mvshared.quantization.plans import preset_of
from mvshared.repetition import repeat, requested
from mvshared.request import Request, prepare
from mvshared.runs import UPSCALE_METHODS, UPSCALED, UpscaleParameters, Views, read_run
from mvshared.upscaling.latents import UpscaleProgress
from mvshared.upscaling.standalone import read_source
from mvshared.upscaling.views import UpscaleOptions, option_label, plan_upscale

if TYPE_CHECKING:
    from mvshared.tokenizer import CLIPTokenizer

LOAD_OPTIONS = ("backend", "dtype", "device", "quantize", "low_memory", "memory_budget")
# What may stand beside --config: it changes where the result goes, not what it is.
BESIDE_CONFIG = {"config", "output", "force", "as_json", "stepwise", "check_numerics"}


class Result(NamedTuple):
    """What a run made, and the pipeline that can make more of it."""

    pipeline: Pipeline[Any]
    views: Views


class Reporter:
    """Progress of a run: a bar on stderr if that is a terminal, events on stdout with --json."""

    def __init__(self, *, as_json: bool, stepwise: Path | None) -> None:
        self.as_json, self.stepwise = as_json, stepwise
        self.bar: tqdm[Any] | None = None

    def event(self, name: str, **values: Any) -> None:
        """Print an event if asked to."""
        if self.as_json:
            print_json({"event": name, **values})

    def step(self, progress: Progress) -> None:
        """Show a sampling step."""
        if self.stepwise is not None:
            if progress.step == 1:  # those of an earlier run, which may have had more
                remove_others(make_folder(self.stepwise), "step_[0-9][0-9][0-9][0-9].png", keep=())
            write_atomic(make_folder(self.stepwise) / f"step_{progress.step:04}.png", encode_png(grid(progress.preview())))
        self.event("step", step=progress.step, steps=progress.steps, timestep=progress.timestep)
        self._advance("sampling", progress.step, progress.steps)

    def loaded(self, name: str, model: Model[Any]) -> None:
        """Say what a model is loaded as."""
        facts = {field: getattr(model, field) for field in ("backend", "device", "dtype", "quantization")}
        self.event("loaded", model=name, **facts)

    def upscale_step(self, progress: UpscaleProgress) -> None:
        """Show a step of the upscaling."""
        self.event("upscale_step", step=progress.step, steps=progress.steps)
        self._advance("upscaling", progress.step, progress.steps)

    def close(self) -> None:
        """End a bar that stands half-way."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _advance(self, what: str, step: int, steps: int) -> None:
        if self.bar is None:
            self.bar = tqdm(total=steps, desc=what, unit="step", disable=None, file=sys.stderr)
        self.bar.update()
        if step == steps:
            self.close()


def generate_views(options: dict[str, Any], *, given: set[str]) -> None:
    """`mvmlx generate`: `given` names the options that the user wrote."""
    reporter = Reporter(as_json=options["as_json"], stepwise=options["stepwise"])
    seeds = list(options["seeds"]) or [0]
    folders = _output_folders(options, seeds)
    sources = [*options["image"], *options["normals"]]
    sources += [path for path in (options["latents"], options["cameras"]) if path is not None]
    for folder in folders:
        check_source(folder, sources)
        try:
            check_free(folder, force=options["force"])
            check_free(folder / UPSCALED, force=options["force"])
        except OutputError as refused:
            refused.hint = "; ".join([*_what_is_missing(folders, seeds), *[refused.hint] * bool(refused.hint)])
            raise
    for beside in (reporter.stepwise, options["check_numerics"]):
        if beside is not None:
            check_folder(beside)
    config = options["config"]
    with shown_warnings(reporter):
        if config is None:
            runs = _new_runs(options, seeds)
        else:
            runs = [_repeated_run(config, folders[0], given=given, check_numerics=options["check_numerics"])]
    for folder, run in zip(folders, runs, strict=True):
        if len(folders) > 1 and options["stepwise"] is not None:
            reporter.stepwise = options["stepwise"] / folder.name
        with shown_warnings(reporter):
            result = run(reporter)
        views = result.views
        _save(views, folder, reporter, force=options["force"])
        if views.parameters.upscale is not None:
            _upscale(result, folder, reporter, check_numerics=options["check_numerics"])


def _what_is_missing(folders: Sequence[Path], seeds: Sequence[int]) -> list[str]:
    """The calls that do what a call with these output folders was killed before, if that was it."""
    calls = []
    with suppress(MvError, OSError):
        missing = [seed for folder, seed in zip(folders, seeds, strict=True) if not (folder / METADATA).exists()]
        if 0 < len(missing) < len(folders):
            output = folders[0].parent / f"seed_{missing[0]}" if len(missing) == 1 else folders[0].parent
            options = " ".join(f"--seed {seed}" for seed in missing)
            calls.append(f"if it was this call, {options} -o {shlex.quote(str(output))} makes what is missing")
        for folder in folders:
            if (folder / METADATA).exists() and not (folder / UPSCALED / METADATA).exists():
                source = read_source([folder])  # refuses views that are upscaled
                if source.run is not None and source.run.upscale is not None:
                    calls.append(f"mvmlx upscale {shlex.quote(str(folder))} upscales its views")
    return calls


def _upscale(result: Result, folder: Path, reporter: Reporter, *, check_numerics: Path | None) -> None:
    """Upscale views that are saved in `folder` already, where they stay if this fails."""
    views, parameters = result.views, result.views.parameters.upscale
    assert parameters is not None
    try:
        with shown_warnings(reporter):
            upscaled = result.pipeline.upscale_as(
                views, parameters, check_numerics=check_numerics, on_step=reporter.upscale_step
            )
        _save(upscaled, folder / UPSCALED, reporter, force=True)
    except MvError as error:
        kept = f"the views of {views.images.shape[1]} pixels are in {folder}"
        error.hint = f"{error.hint}; {kept}" if error.hint else kept
        raise


def _save(views: Views, folder: Path, reporter: Reporter, *, force: bool) -> None:
    views.save(folder, force=force)
    reporter.event("saved", folder=str(folder), views=len(views.images), seed=views.parameters.seed)
    if not reporter.as_json:
        count = len(views.images)
        click.echo(f"{count} view{'s' if count > 1 else ''} in {folder} (see grid.png)")


@contextmanager
def shown_warnings(reporter: Reporter) -> Iterator[None]:
    """Print what is warned of inside, each text once."""
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", MvWarning)
            yield
    finally:
        reporter.close()
        for each in caught:
            if not issubclass(each.category, MvWarning):
                warnings.showwarning(each.message, each.category, each.filename, each.lineno, each.file, each.line)
        for text in sorted({str(each.message) for each in caught if issubclass(each.category, MvWarning)}):
            reporter.event("warning", message=text)
            say(f"warning: {text}")


def _output_folders(options: dict[str, Any], seeds: list[int]) -> list[Path]:
    output, image = options["output"], options["image"][0] if options["image"] else None
    if output is None:
        source = image
        if options["config"] is not None:
            config = options["config"].resolve()
            source = config if config.is_dir() else config.parent
        name = None if source is None else source.name if source.is_dir() else source.stem
        output = Path("views" if name is None else f"{name}-views")
    elif str(output) == "-":
        raise OptionError("output", expected="a folder: views do not go to standard output", got="-")
    return [output] if len(seeds) == 1 else [output / f"seed_{seed}" for seed in seeds]


def _repeated_run(config: Path, output: Path, *, given: set[str], check_numerics: Path | None) -> Callable[[Reporter], Result]:
    clash = sorted(given - BESIDE_CONFIG)
    if clash:
        options = {each.name: each.opts[0] for each in click.get_current_context().command.params}
        option = options[clash[0]]
        raise OptionError(option, expected="left out where --config is given", got=f"--config and {option}")
    run = read_run(config)
    parameters = run.parameters
    for source in (parameters.image, parameters.normals, parameters.latents):
        check_source(output, [Path(name) for name in ((source,) if isinstance(source, str) else source or ())])
    request = requested(run, *described(parameters.model))

    def repeated(reporter: Reporter) -> Result:
        pipeline = load(
            parameters.model,
            backend=parameters.backend,
            dtype=parameters.dtype,
            device=parameters.device,
            quantize=preset_of(parameters.quantization),
            low_memory=not parameters.memory.networks_at_once,
        )
        reporter.loaded(parameters.model, pipeline.model)
        return Result(pipeline, repeat(pipeline, run, request=request, check_numerics=check_numerics, on_step=reporter.step))

    return repeated


def poses_in(path: Path, config: ModelConfig) -> NDArray[np.float32]:
    """Poses (v, 4, 4) in a file of cameras, with an MvWarning if their lens is not the model's."""
    cameras, fov_deg = load_cameras(path, radius=config.camera.radius), config.camera.fov_deg
    if lens := other_lenses(cameras.fovs_deg, fov_deg):
        warn(f"{path}: has a field of view of {lens}, and views have that of the model, {fov_deg:.1f}")
    return cameras.poses


def described(model: str) -> tuple[ModelConfig, Callable[[], "CLIPTokenizer"]]:
    """The config of a model, and what loads its tokenizer."""
    folder = find_model(model)
    config = read_model_config(folder)

    def tokenizer() -> "CLIPTokenizer":
        from mvshared.tokenizer import load_tokenizer

        return load_tokenizer(folder, config.text_encoder)

    return config, tokenizer


def _new_runs(options: dict[str, Any], seeds: list[int]) -> list[Callable[[Reporter], Result]]:
    if not options["image"] and options["prompt"] is None:
        hint = "mvmlx generate PICTURE, or --prompt with a model that takes text"
        raise OptionError("image", expected="a picture to start from", got=None, hint=hint)
    if options["stepwise"] is not None and options["memory_budget"] is not None:
        expected = "left out with a memory budget, which counts no previews"
        raise OptionError("stepwise", expected=expected, got=str(options["stepwise"]))
    if len(set(seeds)) != len(seeds):
        raise OptionError("seed", expected="different for every result", got=seeds)
    config, tokenizer = described(options["model"])
    upscale = upscale_parameters(options, config)
    request = prepare(
        config,
        tokenizer,
        image=list(options["image"]) or None,
        prompt=options["prompt"],
        negative_prompt=options["negative_prompt"],
        image_scale=options["image_scale"],
        reference_scale=options["reference_scale"],
        views=options["views"],
        azimuths_deg=options["azimuths"],
        elevation_deg=options["elevation"],
        cameras=None if options["cameras"] is None else poses_in(options["cameras"], config),
        normals=options["normals"][0] if len(options["normals"]) == 1 else list(options["normals"]) or None,
        normal_space=options["normal_space"],
        steps=options["steps"],
        guidance=options["guidance"],
        guidance_text=options["guidance_text"],
        guidance_image=options["guidance_image"],
        guidance_normals=options["guidance_normals"],
        guidance_interval=options["guidance_interval"],
        guidance_every=options["guidance_every"],
        guidance_rescale=options["guidance_rescale"],
        scheduler=options["scheduler"],
        spacing=options["spacing"],
        eta=options["eta"],
        kv_pooling=options["kv_pooling"],
        seed=seeds[0],
        size_px=options["size"],
        latents=options["latents"],
    )
    loaded: list[Pipeline[Any]] = []

    def run(reporter: Reporter, request: Request) -> Result:
        if not loaded:
            loaded.append(load(options["model"], **{name: options[name] for name in LOAD_OPTIONS}))
            reporter.loaded(options["model"], loaded[0].model)
        views = loaded[0].run(request, upscale=upscale, check_numerics=options["check_numerics"], on_step=reporter.step)
        return Result(loaded[0], views)

    requests = [request.with_seed(seed) for seed in seeds]
    return [lambda reporter, request=request: run(reporter, request) for request in requests]


def upscale_parameters(options: dict[str, Any], config: ModelConfig) -> UpscaleParameters | None:
    """What --upscale and the options beside it ask for, checked; None without it."""
    if options["upscale"] not in ("none", *UPSCALE_METHODS):
        raise OptionError("upscale", expected=f"one of none, {', '.join(UPSCALE_METHODS)}", got=options["upscale"])
    asked = upscale_options(options)
    if asked is None:
        return None
    size_px = config.defaults.size_px if options["size"] is None else options["size"]
    side = max(1, size_px // config.vae.downscale)
    backend = choose_backend(options["backend"])
    dtype = chosen_dtype(options["dtype"], backend=backend, device=options["device"])
    return plan_upscale(asked, vae=config.vae, latent_size=(side, side), backend=backend, dtype=dtype)


def upscale_options(options: dict[str, Any]) -> UpscaleOptions | None:
    """What the options of `cli.upscale_options` ask for; None for the method none, which has no other options.

    Raises OptionError.
    """
    beside = {
        "upscaler": options["upscaler"],
        "steps": options["upscale_steps"],
        "guidance": options["upscale_guidance"],
        "noise_level": options["upscale_noise"],
    }
    low_memory = options.get("low_memory", False) or options.get("memory_budget") is not None
    if options["upscale"] == "none":
        for name, value in (*beside.items(), ("budget_bytes", options["upscale_budget"])):
            if value is not None:
                raise OptionError(option_label(name), expected="left out without --upscale", got=value)
        return None
    budget = options["upscale_budget"]
    budget_bytes = None if budget is None else round(1e9 * number(option_label("budget_bytes"), budget, 1e-3, 1e6))
    return UpscaleOptions(method=options["upscale"] or "sd-x2", budget_bytes=budget_bytes, low_memory=low_memory, **beside)
