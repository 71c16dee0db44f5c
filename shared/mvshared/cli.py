"""The command line: parse, call, print. Every error is one line on stderr and an exit code of docs/exit-codes.md.

Only click is imported at start-up, so that --help answers at once.
"""

import errno
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from mvshared import __version__
from mvshared.entry import INTERRUPT_EXIT, INTERRUPTED
from mvshared.errors import MemoryBudgetError, MvError, OptionError, OutputError
from mvshared.messages import print_json, say, warnings_in_lines

USAGE_EXIT, INTERNAL_EXIT = 2, 70
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
# What the allocators of PyTorch and MLX say, in errors that have no class of their own but for CUDA's.
_NO_MEMORY = re.compile(r"out ?of ?memory|can't allocate memory|not enough memory|(unable|attempting) to allocate", re.I)
# Arguments of a call in Python, as hints have them; a path may have such parts as well.
_ARGUMENT = re.compile(r'(?<!\S)(?:(size_px|views)=(\d+)|([a-z_]+)=("\w+"|True|FOLDER))(?=[\s,;)]|$)')
_OTHER = re.compile(r"`([a-z_]+)`")  # another argument than the one that an error is about
# Names in errors that are not the option's; others are, but for the unit behind them.
_WRITTEN = {
    "method": "--upscale",
    "steps of the upscaler": "--upscale-steps",
    "guidance of the upscaler": "--upscale-guidance",
    "noise level of the upscaler": "--upscale-noise",
    "memory budget of the upscaler": "--upscale-budget",
    "shard size": "--shard-gb",
}


PATH = click.Path(path_type=Path, readable=False)  # whoever reads it says what is wrong with it, with its own exit code


class NumberList(click.ParamType):
    """Numbers with commas between them, such as 0,90,180."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[float]:
        if isinstance(value, list):
            return value
        try:
            return [float(part) for part in value.split(",")]
        except ValueError:
            self.fail(f"{value!r} must be numbers with commas between them, such as 0,90,180", param, ctx)


class NumberRange(click.ParamType):
    """A range of whole numbers, first:end, where the end is left out."""

    name = "first:end"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> range:
        if isinstance(value, range):
            return value
        first, colon, end = value.partition(":")
        if not colon or not first.isdecimal() or not end.isdecimal() or int(first) >= int(end):
            self.fail(f"{value!r} must be two whole numbers, the second one larger, such as 0:64", param, ctx)
        return range(int(first), int(end))


def backend_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every command that computes."""
    for option in (
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, or gpu with MLX."),
        click.option("--backend", default="auto", show_default=True, help="auto, mlx or torch."),
    ):
        function = option(function)
    return function


QUANTIZE = click.option("--quantize", help="q8 or q4: quantise the weights as they are loaded.  [default: as they are stored]")


def memory_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every command that can do with less memory."""
    for option in (
        click.option("--memory-budget", help="Most memory to use, such as 6GB; refused at once if that is not enough."),
        click.option("--low-memory", is_flag=True, help="As little memory as possible: one network after the other."),
    ):
        function = option(function)
    return function


def sampler_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every command that samples; see docs/samplers.md."""
    for option in (
        click.option("--spacing", help="leading, trailing, linspace or karras timesteps.  [default: the model's]"),
        click.option(
            "--scheduler",
            help="ddim, euler, euler-ancestral, dpmpp-2m, dpmpp-2m-sde, dpmpp-2s or unipc.  [default: the model's]",
        ),
    ):
        function = option(function)
    return function


def upscale_options(*, default: str | None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The options of every command that upscales."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in (
            click.option("--upscale-budget", type=float, help="GB for the upscaler's activations.  [default: 2]"),
            click.option("--upscale-noise", type=float, help="Noise level of the upscaler, 0 to 1.  [default: the upscaler's]"),
            click.option("--upscale-guidance", type=float, help="0 (no prompt), or 1 to 20.  [default: the upscaler's]"),
            click.option("--upscale-steps", type=int, help="Steps of the upscaler.  [default: the upscaler's]"),
            click.option("--upscaler", help="Name or folder of a latent upscaler, for sd-x2."),
            click.option("--upscale", default=default, show_default=True, help="none, bilinear, lanczos or sd-x2."),
        ):
            function = option(function)
        return function

    return add


def camera_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every command that has views."""
    for option in (
        click.option("--elevation", type=float, help="Degrees above the horizon.  [default: the model's]"),
        click.option("--cameras", type=PATH, help="JSON file of cameras, such as a transforms.json."),
        click.option(
            "--azimuths", type=NumberList(), help="Degrees around the object, as 45,135: 0 is its front, 90 its left."
        ),
        click.option("--views", type=int, help="Number of views, spread evenly.  [default: the model's]"),
    ):
        function = option(function)
    return function


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="mvmlx")
def cli() -> None:
    """One picture in, consistent views with their cameras out."""


@cli.command()
@click.argument("image", nargs=-1, type=PATH)
@click.option(
    "--model",
    default="demo",
    show_default=True,
    help="A model's name (see `mvmlx models`) or repository, or a checkpoint folder.",
)
@backend_options
@click.option("--dtype", help="float32, float16 or bfloat16.  [default: the device's]")
@QUANTIZE
@click.option(
    "-o", "--output", type=PATH, help="Output folder.  [default: the picture's name with -views, or views without a picture]"
)
@click.option("--prompt", help="What to show, for a model that takes text.")
@click.option("--negative-prompt", help="What not to show.  [default: the model's]")
@click.option("--image-scale", type=float, default=1.0, show_default=True, help="Weight of the pictures' tokens, 0 to 2.")
@click.option("--reference-scale", type=float, default=1.0, show_default=True, help="Weight of the reference frames, 0 to 2.")
@camera_options
@click.option("--steps", type=int, help="Sampling steps, 1 to 1000.  [default: the model's]")
@click.option("--guidance", type=float, help="Classifier-free guidance, 1 (off) to 20.  [default: the model's]")
@click.option("--guidance-text", type=float, help="Guidance to the text, 1 to 20.  [default: that of --guidance]")
@click.option("--guidance-image", type=float, help="Guidance to the pictures, 1 to 20.  [default: that of --guidance]")
@click.option("--guidance-normals", type=float, help="Guidance to the normal maps, 1 to 20.  [default: 1]")
@click.option(
    "--guidance-interval",
    type=NumberList(),
    default="0,1",
    metavar="START,END",
    show_default=True,
    help="Shares of the run between which steps are guided, 0 to 1.",
)
@click.option(
    "--guidance-every", type=int, default=1, show_default=True, help="Guide every n-th step, add the same in between."
)
@click.option(
    "--guidance-rescale",
    type=float,
    default=0.0,
    show_default=True,
    help="How far a guided result gets its deviation before guidance back, 0 to 1.",
)
@sampler_options
@click.option("--eta", type=float, default=0.0, show_default=True, help="Noise of DDIM, 0 to 1.")
@click.option(
    "--kv-pooling", type=int, default=1, show_default=True, help="2: average keys and values of 2x2 at the finest attention."
)
@click.option("--seed", "seeds", type=int, multiple=True, help="Seed; give it again for more results.  [default: 0]")
@click.option("--size", type=int, help="Width and height in pixels.  [default: the model's]")
@click.option("--latents", type=PATH, help="Initial latents instead of the seed's noise, an .npy file.")
@click.option("--normals", type=PATH, multiple=True, help="Folder of normal maps, or one per view.")
@click.option(
    "--normal-space", help="camera or world; see docs/normals.md.  [default: what their transforms.json says, or camera]"
)
@memory_options
@upscale_options(default="none")
@click.option("--stepwise", type=PATH, help="Folder for a preview of every step.")
@click.option("--check-numerics", type=PATH, help="Look for NaN in every block; folder for what had it.")
@click.option("--config", type=PATH, help="Repeat the run of a metadata.json.")
@click.option("--force", is_flag=True, help="Overwrite a finished run in the output folder.")
@click.option("--json", "as_json", is_flag=True, help="Print events, one JSON object a line.")
@click.pass_context
def generate(ctx: click.Context, **options: Any) -> None:
    """Generate views of what IMAGE shows, or what a prompt says. Several pictures show one subject."""
    from mvshared.commands.generate import generate_views

    generate_views(options, given=set(_written(ctx, options)))


@cli.command()
@click.argument("source", nargs=-1, required=True, type=PATH)
@click.option("-o", "--output", type=PATH, help="Output folder.  [default: upscaled, in the run's; NAME-upscaled]")
@upscale_options(default=None)
@click.option("--model", help="The model whose VAE the latents are of.  [default: the run's, or the upscaler has one]")
@click.option("--prompt", help="What is shown, for an upscaler that takes text.  [default: the run's]")
@click.option("--negative-prompt", help="What is not shown.  [default: the run's]")
@backend_options
@click.option("--dtype", help="float32, float16 or bfloat16.  [default: the run's, or the device's]")
@click.option("--quantize", help="q8 or q4: quantise the upscaler as it is loaded.  [default: the run's]")
@click.option("--seed", type=int, help="Seed.  [default: the run's, or 0]")
@click.option("--force", is_flag=True, help="Overwrite a finished run in the output folder.")
@click.option("--json", "as_json", is_flag=True, help="Print events, one JSON object a line.")
def upscale(source: tuple[Path, ...], **options: Any) -> None:
    """Make views twice as large. SOURCE is an output folder of `mvmlx generate`, pictures, or an .npy file of latents.

    Without --upscale it is done by sd-x2 if an upscaler is named, else as the run asked for, else by lanczos.
    """
    from mvshared.commands.upscale import upscale_files

    upscale_files(source, options)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per model.")
def models(as_json: bool) -> None:
    """List the models that have a name: in the package, downloaded, and to download."""
    from mvshared.commands.checkpoints import list_models

    list_models(as_json=as_json)


@cli.command()
@click.argument("name")
@click.option("--revision", help="Commit, branch or tag.  [default: the pinned one, the newest the first time]")
@click.option("--verify", is_flag=True, help="Hash what is there already.")
@click.option("--json", "as_json", is_flag=True, help="Print where the model is as JSON.")
def download(name: str, **options: Any) -> None:
    """Download NAME, one of `mvmlx models` or a repository of huggingface.co such as owner/name."""
    from mvshared.commands.checkpoints import download_model

    download_model(name, options)


@cli.command()
@click.argument("model", required=False)
@backend_options
@click.option("--estimate", is_flag=True, help="The memory that a run of MODEL takes, with the options from here on.")
@click.option("--dtype", help="float32, float16 or bfloat16.  [default: the device's]")
@click.option("--quantize", help="q8 or q4, as of `mvmlx generate`.")
@click.option("--views", type=int, help="Number of views.  [default: the model's]")
@click.option("--size", type=int, help="Width and height in pixels.  [default: the model's]")
@click.option("--guidance", type=float, help="Guidance.  [default: the model's]")
@memory_options
@upscale_options(default="none")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def info(model: str | None, backend: str, device: str, estimate: bool, as_json: bool, **options: Any) -> None:
    """Say what is in MODEL, a model's name or repository or a checkpoint folder, and what is wrong with it.

    And what the installed backends compute on, in which dtype, and why; without MODEL, only that. With --estimate instead the
    memory of a run, stage by stage.
    """
    if estimate:
        from mvshared.commands.estimate import show_estimate

        if model is None:
            raise click.UsageError("--estimate needs a MODEL", ctx=click.get_current_context())
        show_estimate(model, {"backend": backend, "device": device, "as_json": as_json, **options})
        return
    context = click.get_current_context()
    for name in _written(context, (*options, "device")):
        raise click.UsageError(f"--{name.replace('_', '-')} goes with --estimate", ctx=context)
    from mvshared.commands.checkpoints import show_model

    show_model(model, backend=backend, as_json=as_json)


@cli.command()
@click.argument("source", type=PATH)
@click.argument("dest", type=PATH)
@click.option("--dtype", help="float32, float16 or bfloat16.  [default: as it is stored]")
@click.option("--family", help="What the tensors do not tell: sd21-768 or imagedream-local.  [default: what they are]")
@click.option("--with", "extra", type=PATH, multiple=True, help="File or folder with what SOURCE lacks; repeatable.")
@click.option("--like", type=PATH, help="Folder of the same sizes to take configs and tokenizer from.")
@click.option("--shard-gb", type=float, default=5.0, show_default=True, help="Largest size of a weight file.")
@click.option("--force", is_flag=True, help="Write into a folder that is not empty, or over a file.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def convert(source: Path, dest: Path, **options: Any) -> None:
    """Convert SOURCE to the folder DEST in diffusers' layout.

    SOURCE is a .safetensors, .pt, .ckpt or .pth file under the names of the original code, or a folder of diffusers' layout to
    store in another dtype. If DEST ends in .safetensors, a folder becomes one file under the original names, and a file another
    one under the same names.
    """
    from mvshared.commands.checkpoints import convert_checkpoint

    convert_checkpoint(source, dest, options)


@cli.command()
@click.argument("source")
@click.argument("dest", type=PATH)
@click.option("--preset", help="q8, or q4, which keeps the layers that lose most in 8 bits.  [default: q8]")
@click.option("--bits", type=int, help="2, 3, 4, 5, 6 or 8 for every layer, instead of a preset.")
@click.option(
    "--group-size", type=int, default=64, show_default=True, help="Numbers that share a scale, 64 or 32; with --bits."
)
@click.option("--components", help="With commas between.  [default: unet,text_encoder,image_encoder, where they are there]")
@click.option("--measure/--no-measure", default=True, show_default=True, help="Run the network once per layer for its error.")
@click.option("--report", type=PATH, help="File for every layer's figures, .csv or .json.")
@backend_options
@click.option("--force", is_flag=True, help="Write into a folder that is not empty.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def quantize(source: str, dest: Path, **options: Any) -> None:
    """Store SOURCE, a model's name or repository or a checkpoint folder, with weights of few bits in the folder DEST.

    DEST loads as every folder does. See docs/quantization.md.
    """
    from mvshared.commands.checkpoints import quantize_model

    quantize_model(source, dest, options)


@cli.group()
def init() -> None:
    """Make a model to train from the weights of another."""


@init.command()
@click.argument("dest", type=PATH)
@click.option("--from", "source", required=True, help="Folder of ImageDream, MVDream or Stable Diffusion 2.1.")
@click.option("--image-encoder", type=PATH, help="CLIPVisionModel folder, for a source that has none.")
@click.option("--cameras", is_flag=True, help="Add a camera embedding to a source without one.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the new weights that are not zero.")
@click.option("--force", is_flag=True, help="Write into a folder that is not empty.")
def gaf(dest: Path, **options: Any) -> None:
    """Make DEST a GAF model: ImageDream with normal maps. Until it is trained, it computes what its source does."""
    from mvshared.commands.checkpoints import init_gaf_model

    init_gaf_model(dest, options)


@cli.command()
@click.argument("model")
@click.option("--against", required=True, help="What to compare with: mlx, torch, diffusers, or the same backend in float32.")
@backend_options
@click.option("--dtype", default="float32", show_default=True, help="float32, float16 or bfloat16; the reference has float32.")
@click.option("--quantize", help="q8 or q4: quantise MODEL, and compare it with its weights of full precision.")
@click.option("--reference", help="The model whose weights the other side has, such as the one MODEL was quantised from.")
@click.option("--tolerance", type=float, help="Relative RMS that a block may differ by.  [default: 2e-5 in float32]")
@click.option("--save", type=PATH, help="Folder for the activations of both sides, as .npy files.")
@click.option("--summary", is_flag=True, help="Print a line per network instead of one per block.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per block, or per network.")
def validate(model: str, **options: Any) -> None:
    """Run MODEL's networks on the same inputs in two implementations, or dtypes, and compare them block by block."""
    from mvshared.commands.checkpoints import validate_model

    validate_model(model, options)


@cli.command()
@click.argument("model")
@click.option("--image", type=PATH, multiple=True, help="Picture of the subject.  [default: a made-up one]")
@click.option("--prompt", help="What to show, for a model that takes text.")
@click.option("--negative-prompt", help="What not to show.  [default: the model's]")
@camera_options
@click.option("--steps", type=int, default=4, show_default=True, help="Sampling steps.")
@click.option("--guidance", type=float, help="Classifier-free guidance, 1 (off) to 20.  [default: the model's]")
@sampler_options
@click.option("--size", type=int, help="Width and height in pixels.  [default: the model's]")
@backend_options
@click.option("--dtype", help="float32, float16 or bfloat16.  [default: the device's]")
@QUANTIZE
@memory_options
@click.option(
    "--depth", type=click.IntRange(1), default=2, show_default=True, help="How deep blocks inside of blocks are shown."
)
@click.option("--trace", type=PATH, help="File for a trace, to be opened at ui.perfetto.dev.")
@click.option("--json", "as_json", is_flag=True, help="Print all figures as one JSON object.")
def profile(model: str, **options: Any) -> None:
    """Say where the time and the memory of a run of MODEL go: by stage, by block, and its three largest costs."""
    from mvshared.commands.profile import profile_model

    profile_model(model, options)


@cli.command()
@click.argument("name", nargs=-1)
@click.option(
    "--model", default="demo", show_default=True, help="A model's name or folder; sd21, mvdream, imagedream need no download."
)
@click.option("--backend", default="all", show_default=True, help="all, mlx or torch.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, or gpu with MLX.")
@click.option("--dtype", multiple=True, help="float32, float16 or bfloat16; repeatable.  [default: float32, and the device's]")
@click.option("--views", type=NumberList(), help="Numbers of views of a step, such as 1,4,8.  [default: the model's]")
@click.option("--sizes", type=NumberList(), help="Widths and heights in pixels, such as 256,512.  [default: the model's]")
@click.option("--guidance", default="both", show_default=True, help="Steps with guidance: on, off or both.")
@click.option("--steps", type=int, help="Steps of a whole run.  [default: the model's]")
@click.option("--repeats", type=int, default=5, show_default=True, help="Calls that count, more of short ones.")
@click.option("--threads", type=int, help="Threads on the CPU.  [default: the library's]")
@click.option("--against", help="diffusers: the same work from it, in turns, and the ratio of the times.")
@click.option(
    "--compiled",
    is_flag=False,
    flag_value="max-autotune",
    help="With --against, torch.compile too, which takes minutes; --compiled=MODE for another mode than max-autotune.",
)
@click.option("--json", "file", type=PATH, metavar="FILE", help="Write the results here; - prints them.")
def benchmark(name: tuple[str, ...], **options: Any) -> None:
    """Measure this machine: time, memory, arithmetic per second and its share of what the machine can do.

    NAME is one of start, load, condition, step, vae, upscaler and run, or growth for how time and memory grow with views,
    pixels and steps. Without NAME it is all that takes a minute or two with the demo model. See docs/benchmarks.md.
    """
    from mvshared.commands.benchmark import run_benchmark

    run_benchmark(name, options)


@cli.command()
@click.argument("config", required=False, type=PATH)
@click.option("-o", "--output", required=True, type=PATH, help="Run folder; a run in it goes on.")
@click.option("--family", help="Train by this family's recipe instead of a CONFIG: gaf.")
@click.option("--from", help="The model that the recipe starts from, such as `mvmlx init gaf` writes it.")
@click.option("--data", type=PATH, help="Folder of captures that the recipe trains on.")
@click.option("--steps", type=int, help="Training steps.  [default: the recipe's, like all of these]")
@click.option("--batch-size", type=int, help="Subjects per step.")
@click.option("--learning-rate", type=float, help="After the warm-up.")
@click.option("--dtype", help="float32, float16 or bfloat16.")
@click.option("--seed", type=int, help="Of the batches.")
@click.option("--prompt", help="Text of every picture.")
@click.option("--held-out", type=float, help="Share of the captures kept for validation; 0 trains on all.")
@click.option("--checkpoint-every", type=int, help="Steps between two states that a killed run goes on from.")
@click.option("--gradient-checkpointing/--no-gradient-checkpointing", default=None, help="Less memory, more time.")
@backend_options
def train(config: Path | None, output: Path, backend: str, device: str, **options: Any) -> None:
    """Train one stage of a model as the TOML file CONFIG says, or by a family's recipe; see docs/training.md."""
    from mvshared.commands.training import train_model

    train_model(config, output, options, backend=backend, device=device)


@cli.command("render-heads")
@click.argument("output", type=PATH)
@click.option(
    "--identities", type=NumberRange(), default="100000:104000", show_default=True, help="Numbers of the heads, first:end."
)
@click.option("--views", type=int, default=8, show_default=True, help="Views per head.")
@click.option("--size", type=int, default=128, show_default=True, help="Width and height in pixels.")
@click.option("--processes", type=int, help="Worker processes.  [default: one per core]")
def render_heads(output: Path, identities: range, views: int, size: int, processes: int | None) -> None:
    """Render procedural heads into OUTPUT, a folder of captures to train on. Heads that are there are kept."""
    from mvshared.commands.training import render_head_dataset

    render_head_dataset(output, identities, views=views, size_px=size, processes=processes)


@cli.command("render-normals")
@click.argument("mesh", type=PATH)
@click.option("-o", "--output", required=True, type=PATH, help="Output folder.")
@click.option("--model", default="demo", show_default=True, help="The model whose cameras, size and framing are taken.")
@camera_options
@click.option("--size", type=int, help="Width and height in pixels.  [default: the model's]")
@click.option("--space", default="camera", show_default=True, help="Space of the normals, camera or world.")
@click.option("--up", default="y", show_default=True, help="Up axis of the mesh, y or z.")
@click.option("--fit/--no-fit", default=True, show_default=True, help="Move and scale the mesh into the model's frame.")
@click.option("--force", is_flag=True, help="Overwrite normal maps in the output folder.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
def render_normals(mesh: Path, **options: Any) -> None:
    """Render normal maps of MESH, an OBJ, PLY or GLB file, for `mvmlx generate --normals`. See docs/normals.md."""
    from mvshared.commands.normals import render_normal_maps

    render_normal_maps(mesh, options)


@cli.command()
@click.argument("folder", required=False, type=PATH)
@click.option("--model", default="demo", show_default=True, help="A model's name or repository, or a checkpoint folder.")
@backend_options
@click.option("--dtype", help="float32, float16 or bfloat16.  [default: the device's]")
@QUANTIZE
@click.option("--identities", type=NumberRange(), default="0:64", show_default=True, help="Numbers of the heads, first:end.")
@click.option("--steps", type=int, help="Sampling steps.  [default: the model's]")
@click.option("--guidance", type=float, help="Guidance.  [default: the model's]")
@sampler_options
@click.option("--views", type=int, help="Views per head, spread evenly from azimuth 45 on.  [default: 4]")
@click.option("--together", type=int, help="Views of a head that are generated in one run.  [default: all]")
@click.option("--prompt", help="Text for every head, for a model that takes one.")
@click.option("--negative-prompt", help="What not to show.  [default: the model's]")
@click.option("--normals", is_flag=True, help="Give the true normal maps to the model.")
@click.option("--upscaler", help="Measure this latent upscaler on the model's views instead, beside lanczos and bilinear.")
@click.option("--upscale-steps", type=int, help="Steps of the upscaler.  [default: the upscaler's]")
@click.option("--upscale-noise", type=float, help="Noise level of the upscaler, 0 to 1.  [default: the upscaler's]")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed.")
@click.option("-o", "--output", type=PATH, help="Folder for evaluation.json and sheets.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@click.pass_context
def evaluate(ctx: click.Context, folder: Path | None, **options: Any) -> None:
    """Measure how consistent the views in FOLDER are, or how good a model is on held-out heads.

    FOLDER has pictures and their transforms.json: an output of `mvmlx generate`, or a capture. Only -o and --json go with it.
    Without FOLDER, views of heads are compared with true renders: PSNR, SSIM, the face, silhouettes, consistency, identity.
    """
    from mvshared.commands.evaluate import evaluate_folder, evaluate_model, evaluate_upscaler

    if folder is None:
        (evaluate_model if options["upscaler"] is None else evaluate_upscaler)(options)
    else:
        evaluate_folder(folder, options, given=_written(ctx, options))


def _written(ctx: click.Context, names: Iterable[str]) -> list[str]:
    """Which of the parameters the command line has, and not from their defaults."""
    return [name for name in names if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE]


def main() -> None:
    """Entry point of `mvmlx`: run, and turn every error into one line and an exit code.

    Where neither OMP_WAIT_POLICY nor GOMP_SPINCOUNT is set, the latter is: PyTorch's OpenMP threads then spin for some 100
    microseconds while they wait, and sleep after that. By default they spin for milliseconds, which makes a run several times
    longer as soon as another program wants the cores. PyTorch reads it as it is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, by `2>&-` for example; who prints need not know
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - for as long as the program runs
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names need not be what the terminal can show
    logging.basicConfig(format="mvmlx: note: %(message)s")  # what a backend logs once, of kernels that are not there
    code = run(sys.argv[1:])
    try:
        sys.stderr.flush()
    except OSError:  # nobody can be told, and the exit code is to be that of the command
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run the command line; returns the exit code."""
    as_json = _wants_json(arguments)
    try:
        with cli.make_context("mvmlx", list(arguments)) as context, warnings_in_lines():
            cli.invoke(context)
        return 0
    except click.exceptions.Exit as end:  # of --help and --version
        return end.exit_code
    except click.exceptions.NoArgsIsHelpError as help_wanted:
        click.echo(help_wanted.format_message())
        return 0
    except click.ClickException as error:
        command = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "mvmlx"
        message = " ".join(error.format_message().split())
        return _fail(f"{message} (see {command} --help)", USAGE_EXIT, kind=type(error).__name__, as_json=as_json)
    except MvError as error:
        return _fail(_one_line(error, arguments), error.exit_code, kind=type(error).__name__, as_json=as_json)
    except (KeyboardInterrupt, click.Abort):
        return _fail(INTERRUPTED, INTERRUPT_EXIT, kind="Interrupt", as_json=as_json)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if _was_interrupted(error):
            return _fail(INTERRUPTED, INTERRUPT_EXIT, kind="Interrupt", as_json=as_json)
        if os.environ.get("MVMLX_TRACEBACK"):
            raise
        if isinstance(error, OSError) and error.strerror and (error.filename is not None or error.errno in _NO_ROOM):
            text = error.strerror if error.filename is None else f"{os.fsdecode(error.filename)}: {error.strerror}"
            hint = "the system does not let mvmlx read or write there"
            if error.errno in _NO_ROOM and error.filename is None:
                hint = "there is no room for what is written, such as where standard output goes"
            return _fail(f"{text} ({hint})", OutputError.exit_code, kind=type(error).__name__, as_json=as_json)
        text = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(text)):
            known = _options(arguments)
            smaller = [each for each in ("--low-memory", "--memory-budget", "--size", "--views", "--dtype") if each in known]
            hint = f"memory ran out; what helps may be {', '.join(smaller)}" if smaller else "memory ran out"
            return _fail(f"{text} ({hint})", MemoryBudgetError.exit_code, kind="OutOfMemory", as_json=as_json)
        hint = "this is a fault of mvmlx: please report it with what MVMLX_TRACEBACK=1 prints"
        return _fail(f"{text} ({hint})", INTERNAL_EXIT, kind="InternalError", as_json=as_json)


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether an error comes from an interruption, as that of compiled code does."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _one_line(error: MvError, arguments: list[str]) -> str:
    """An error's text, which speaks of Python's parameters, with the options of the command line: --size 64 for size_px=64.

    Beside --config values are those of a file, and nobody has written an option for them.
    """
    known, of_a_file = _options(arguments), any(word.startswith("--config") for word in arguments)

    def option(name: str) -> str:
        written = "--" + name.replace(" ", "-").replace("_", "-")
        forms = (_WRITTEN.get(name), written, written.removesuffix("-px"), written.removesuffix("-deg"))
        return next((each for each in forms if each in known), name)

    def with_value(found: re.Match[str]) -> str:
        given = found[1] or found[3]
        if given == "check_numerics" and "--check-numerics" not in known:
            return "mvmlx generate --check-numerics FOLDER"
        name, value = option(given), (found[2] or found[4]).strip('"')
        return found[0] if name == given else name if value == "True" else f"{name} {value}"

    def others(words: str) -> str:
        return _OTHER.sub(lambda found: found[1] if of_a_file else option(found[1]), words)

    text = error.message
    if isinstance(error, OptionError):
        text = text.replace(error.expected, others(error.expected), 1)
        text = text if of_a_file else option(error.name) + text.removeprefix(error.name)
    hint = others(_ARGUMENT.sub(with_value, error.hint))
    return " ".join((f"{text} ({hint})" if hint else text).split())


def _options(arguments: list[str]) -> set[str]:
    """The options of the command that is called, or of the group of commands as far as it can be told."""
    command: click.Command = cli
    for word in arguments:
        if not isinstance(command, click.Group):
            break
        command = command.commands.get(word, command)
    return {option for each in command.params for option in each.opts}


def _wants_json(arguments: list[str]) -> bool:
    """Whether an error is told as JSON too. `mvmlx benchmark --json` names a file, or with - standard output."""
    after = arguments[arguments.index("--json") + 1 :][:1] if "--json" in arguments else None
    return after is not None and (arguments[0] != "benchmark" or after == ["-"])


def _fail(message: str, code: int, *, kind: str, as_json: bool) -> int:
    if as_json:
        with suppress(OSError):
            print_json({"event": "error", "kind": kind, "message": message, "exit_code": code})
    say(f"error: {message}")
    return code
