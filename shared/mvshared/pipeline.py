"""Generation, written once for both backends: from a picture and cameras to views, their latents and an output folder.

The sampler's steps are plain floats (mvshared.samplers), noise is numpy's, and arrays of the backend meet only sums and
products with floats here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mvshared.arguments import Latents, Pictures
from mvshared.backend import A, Model
from mvshared.camera import camera_vectors
from mvshared.checkpoint import find_model, model_name
from mvshared.errors import OptionError
from mvshared.guidance import Mixture
from mvshared.images import from_model
from mvshared.memory.budget import MemoryOptions, fit
from mvshared.memory.estimate import ModelSize, RunSize, model_size, process_bytes, with_upscaling
from mvshared.memory.plan import PLAIN, MemoryPlan
from mvshared.normals import Normals
from mvshared.numerics import check_views, checked_numerics
from mvshared.quantization.plans import preset_of
from mvshared.reports import Reports
from mvshared.request import Request, prepare
from mvshared.runs import Parameters, UpscaleParameters, Views
from mvshared.samplers import State, Step, advance, remembered
from mvshared.stages import Stages
from mvshared.upscaling.latents import UpscaleProgress, Upscaler
from mvshared.upscaling.views import UpscaleOptions, load_planned, plan_upscale, upscale_views, upscaler_files
from mvshared.weights import weight_stamps

if TYPE_CHECKING:
    from mvshared.tokenizer import CLIPTokenizer


class Progress(NamedTuple):
    """What `on_step` gets: the step from 1 to `steps`, its timestep, and functions for a look at the state.

    `latents()` are float32 (v, h, w, c), `preview()` decodes the picture as far as it is known, uint8 (v, H, W, 3).
    """

    step: int
    steps: int
    timestep: float
    latents: Callable[[], NDArray[np.float32]]
    preview: Callable[[], NDArray[np.uint8]]


class Pipeline(Generic[A]):
    """A loaded model and what can be done with it. `mvtorch.load` and `mvmlx.load` return one.

    It does one run at a time: a run in another thread waits until the one before it is done.
    """

    def __init__(self, model: Model[A], *, name: str, memory: MemoryOptions | MemoryPlan = PLAIN) -> None:
        """`memory` is how runs use memory, or what a plan for each is chosen by."""
        self.model = model
        self.name = model_name(name)
        self.memory = memory
        self.stages = Stages()
        self._running = RLock()
        self._process_bytes = process_bytes(model.device)  # before the first run: later ones leave networks in memory
        self._upscaler: tuple[Any, Upscaler[Any] | None] | None = None  # the last one, by its name, config and files

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within the context, no other thread runs this pipeline; one that wants to waits."""
        with self._running:
            yield

    def __repr__(self) -> str:
        return f"<Pipeline of {self.name}: {self.model.backend}, {self.model.device}, {self.model.dtype}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a pipeline cannot be copied or pickled: load another one, in the process that runs it")

    @cached_property
    def tokenizer(self) -> "CLIPTokenizer":
        """The tokenizer of the model's folder. Raises CheckpointError if it is missing or does not fit the text encoder."""
        from mvshared.tokenizer import load_tokenizer

        return load_tokenizer(find_model(self.name), self.model.config.text_encoder)

    def generate(
        self,
        image: Pictures | None = None,
        *,
        prompt: str | None = None,
        negative_prompt: str | None = None,
        image_scale: float = 1.0,
        reference_scale: float = 1.0,
        views: int | None = None,
        azimuths_deg: Sequence[float] | None = None,
        elevation_deg: float | None = None,
        cameras: ArrayLike | None = None,
        normals: Normals | None = None,
        normal_space: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        guidance_text: float | None = None,
        guidance_image: float | None = None,
        guidance_normals: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_every: int = 1,
        guidance_rescale: float = 0.0,
        scheduler: str | None = None,
        spacing: str | None = None,
        eta: float = 0.0,
        kv_pooling: int = 1,
        seed: int = 0,
        size_px: int | None = None,
        latents: Latents | None = None,
        upscale: UpscaleParameters | None = None,
        check_numerics: str | Path | None = None,
        on_step: Callable[[Progress], None] | None = None,
    ) -> Views:
        """Views of what `image` shows, `prompt` says, or both, as the model takes them.

        Several pictures of one subject add their image tokens and reference frames, which `image_scale` and `reference_scale`
        weigh. A prompt that is longer than the text encoder takes is cut, with an MvWarning that says where; a picture in which
        no subject is found, for a model that frames it, is taken whole, with an MvWarning that says why.

        The cameras are, in this order: `cameras`, matrices (v, 4, 4) or pairs (azimuth_deg, elevation_deg); `azimuths_deg` at
        `elevation_deg`; `views` cameras spread evenly. Azimuth 0 looks at the object's front. `normals` is a folder or a list
        of normal maps, one per view, in `normal_space` "camera" or "world"; a transforms.json beside them brings their space,
        and their cameras if no others are named (see `mvshared.normals`). `guidance` and what belongs to it are the fields of
        `mvshared.guidance.Guidance`; with 1 there is no unconditional branch. `scheduler` is a name of
        `mvshared.samplers.SAMPLERS`, `spacing` is leading, trailing, linspace or karras, `eta` the noise of ddim. `kv_pooling`
        is that of `mvshared.attention.AttentionOptions`. `latents` float32 (v, h, w, c), or an .npy file of them, replaces the
        initial noise of `seed`; with reference frames it may have as many more, which are ignored. What is None comes from the
        model's defaults. `upscale` is what `upscale_as` will be called with: it is counted in the memory plan and noted in the
        parameters, and nothing is upscaled here. `on_step` is called after every step. `check_numerics` is a folder: every
        block of every network is looked at, and the inputs of the first one that gives NaN or infinity are saved there.

        Raises OptionError, CameraError and ImageError for arguments that are not allowed and MemoryBudgetError for a run that
        does not fit, before any long work, and NumericsError if the latents or the pictures end in NaN or infinity, or at the
        first block with `check_numerics`.
        """
        request = prepare(
            self.model.config,
            lambda: self.tokenizer,
            image=image,
            prompt=prompt,
            negative_prompt=negative_prompt,
            image_scale=image_scale,
            reference_scale=reference_scale,
            views=views,
            azimuths_deg=azimuths_deg,
            elevation_deg=elevation_deg,
            cameras=cameras,
            normals=normals,
            normal_space=normal_space,
            steps=steps,
            guidance=guidance,
            guidance_text=guidance_text,
            guidance_image=guidance_image,
            guidance_normals=guidance_normals,
            guidance_interval=guidance_interval,
            guidance_every=guidance_every,
            guidance_rescale=guidance_rescale,
            scheduler=scheduler,
            spacing=spacing,
            eta=eta,
            kv_pooling=kv_pooling,
            seed=seed,
            size_px=size_px,
            latents=latents,
            stages=self.stages,
        )
        return self.run(request, upscale=upscale, check_numerics=check_numerics, on_step=on_step)

    def run(
        self,
        request: Request,
        *,
        upscale: UpscaleParameters | None = None,
        check_numerics: str | Path | None = None,
        on_step: Callable[[Progress], None] | None = None,
    ) -> Views:
        """Views of what was asked for with `mvshared.request.prepare` of this model's config; the rest is that of `generate`.

        Raises OptionError for a request to another model, MemoryBudgetError and NumericsError.
        """
        if not isinstance(request, Request):
            raise OptionError("request", expected="what mvshared.request.prepare made", got=type(request).__name__)
        if request.config != self.model.config:
            raise OptionError("request", expected="one to this model, and its config is another", got=request.config.family)
        if upscale is not None and not isinstance(upscale, UpscaleParameters):
            expected = "what mvshared.upscaling.views.plan_upscale made, or None; Pipeline.upscale enlarges views by name"
            raise OptionError("upscale", expected=expected, got=upscale)
        if on_step is not None and not callable(on_step):
            raise OptionError("on_step", expected="a function of the progress", got=on_step)
        with self.alone():
            return self._run(request, upscale=upscale, check_numerics=check_numerics, on_step=on_step)

    def _run(
        self,
        request: Request,
        *,
        upscale: UpscaleParameters | None,
        check_numerics: str | Path | None,
        on_step: Callable[[Progress], None] | None,
    ) -> Views:
        model, memory = self.model, self._memory_plan(request.size, upscale)
        parameters = Parameters(
            **request.options,
            model=self.name,
            backend=model.backend,
            dtype=model.dtype,
            device=model.device,
            quantization=model.quantization,
            seed=request.seed,
            upscale=upscale,
            memory=memory,
        )
        pooled = replace(memory, attention=replace(memory.attention, kv_pooling=parameters.kv_pooling))
        with checked_numerics({"": model}, self.stages, check_numerics), model.planned(pooled):
            final = self._sample(request, self._conditions(request, parameters), parameters, on_step)
            check_views(final, "the final latents", where="sampling", dtype=model.dtype)
            images = self._decode(model.from_numpy(final))
        return Views(
            images=images,
            latents=final,
            cameras=request.poses.copy(),  # another run of the same request may follow
            reference=None if request.reference is None else request.reference.copy(),
            parameters=parameters,
            weight_files=model.weight_files,
            upscaler_files=tuple(upscaler_files(upscale)),
            weight_stamps=model.weight_stamps,
        )

    def upscale(
        self,
        views: Views,
        *,
        method: str = "sd-x2",
        upscaler: str | Path | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        noise_level: float | None = None,
        budget_bytes: int | None = None,
        check_numerics: str | Path | None = None,
        on_step: Callable[[UpscaleProgress], None] | None = None,
    ) -> Views:
        """The views at twice their size: by sd-x2, a diffusion model on their latents, by bilinear latents, or by lanczos.

        `upscaler` is the name or the folder of the diffusion model, which sd-x2 needs; it is loaded in this model's backend,
        device and dtype, and quantised if this model was as it was loaded. `steps`, `guidance`, `noise_level` and
        `budget_bytes` are of `mvshared.upscaling.latents.Upscaler.upscale`; the prompts and the seed are those of the views,
        `check_numerics` is that of `generate`.

        Raises OptionError, CheckpointError and MemoryBudgetError before any long work, and NumericsError for latents that are
        not finite.
        """
        options = UpscaleOptions(
            method=method,
            upscaler=upscaler,
            steps=steps,
            guidance=guidance,
            noise_level=noise_level,
            budget_bytes=budget_bytes,
            low_memory=not self._at_once,
        )
        if not isinstance(views, Views):
            raise OptionError("views", expected="what generate returned", got=type(views).__name__)
        height, width = views.latents.shape[1:3]
        model = self.model
        planned = plan_upscale(
            options,
            vae=model.config.vae,
            latent_size=(height, width),
            backend=model.backend,
            dtype=model.dtype,
        )
        return self.upscale_as(views, planned, check_numerics=check_numerics, on_step=on_step)

    def upscale_as(
        self,
        views: Views,
        parameters: UpscaleParameters,
        *,
        check_numerics: str | Path | None = None,
        on_step: Callable[[UpscaleProgress], None] | None = None,
    ) -> Views:
        """The views at twice their size, as the parameters say. Raises as `upscale` does."""
        with self.alone():
            return self._upscale_as(views, parameters, check_numerics=check_numerics, on_step=on_step)

    def _upscale_as(
        self,
        views: Views,
        parameters: UpscaleParameters,
        *,
        check_numerics: str | Path | None,
        on_step: Callable[[UpscaleProgress], None] | None,
    ) -> Views:
        model, run = self.model, views.parameters
        if views.images.shape[1] != views.parameters.size_px:
            size = f"{views.images.shape[2]} x {views.images.shape[1]} pixels"
            raise OptionError("views", expected=f"of {views.parameters.size_px} pixels, not upscaled yet", got=size)
        decoded = parameters.method != "lanczos"
        if decoded and [path.resolve() for path in views.weight_files] != [path.resolve() for path in model.weight_files]:
            raise OptionError("views", expected=f"of {self.name}, whose VAE decodes them", got=views.parameters.model)
        for name in ("backend", "dtype", "device", "quantization"):  # the parameters of the views are to repeat what comes
            if decoded and getattr(run, name) != getattr(model, name):
                expected = f"made with the {name} of this pipeline, {getattr(model, name)!r}"
                raise OptionError("views", expected=expected, got=getattr(run, name))
        stamps = weight_stamps(upscaler_files(parameters))
        read = parameters.upscaler, parameters.config_sha256, stamps
        if self._upscaler is None or self._upscaler[0] != read:
            self._upscaler = read, load_planned(parameters, **self._loading, at_once=self._at_once)
        upscaler, memory = self._upscaler[1], parameters.memory or views.parameters.memory
        if parameters.memory is None and views.parameters.upscale is None:  # no run before has counted it
            memory = self._memory_plan(RunSize(views=len(views.images), size_px=views.parameters.size_px), parameters)
            same = asdict(memory) == asdict(views.parameters.memory)  # and what MLX may take with it
            parameters = replace(parameters, memory=None if same else memory)
        checked = {"": model} if upscaler is None else {"": model, "upscaler.": upscaler.model}
        with ExitStack() as stack:
            stack.enter_context(checked_numerics(checked, self.stages, check_numerics))
            for each in checked.values():
                stack.enter_context(each.planned(memory))
            upscaled = upscale_views(
                views,
                parameters,
                decode=lambda latents: self._pixels(model.from_numpy(latents)),
                upscaler=upscaler,
                on_step=on_step,
                stages=self.stages,
            )
        if upscaler is not None and not self._at_once:
            upscaler.model.release()
        return replace(upscaled, weight_stamps=(*views.weight_stamps, *stamps))

    @property
    def _at_once(self) -> bool:
        """Whether all networks may be in memory together."""
        memory = self.memory
        return memory.at_once if isinstance(memory, MemoryOptions) else memory.networks_at_once

    def _memory_plan(self, run: RunSize, upscale: UpscaleParameters | None) -> MemoryPlan:
        """How a run and the upscaling after it use memory. Raises MemoryBudgetError if no way fits the budget."""
        if isinstance(self.memory, MemoryPlan):
            return self.memory
        if self.memory.at_once:
            return PLAIN
        if upscale is not None:
            run = with_upscaling(run, upscale, **self._loading)
        return fit(self._size, run, self.memory, process_bytes=self._process_bytes).plan

    @property
    def _loading(self) -> dict[str, Any]:
        """How the model was loaded; its upscaler is loaded the same way."""
        model = self.model
        names = ("backend", "device", "dtype")
        return {**{name: getattr(model, name) for name in names}, "quantize": preset_of(model.quantization)}

    @cached_property
    def _size(self) -> ModelSize:
        return model_size(find_model(self.name), **self._loading)

    def _done(self, *components: str) -> None:
        """Drop networks whose stage is over, unless the plan keeps them."""
        if not self.model.plan.networks_at_once:
            self.model.release(*components)

    def _conditions(self, request: Request, parameters: Parameters) -> dict[Mixture, Any]:
        """What the model's `condition` makes of all that stays constant over the steps, for every mixture once."""
        model, config, wanted = self.model, request.config, dict.fromkeys(call.mixture for call in request.calls)
        prompts = request.prompts
        states = reference = text = normal_latents = None
        if request.clip_pixels is not None:
            with self.stages("image_encoder", what="picture"):
                states = model.encode_image(request.clip_pixels)
                self._done("image_encoder")
        if prompts is not None:
            negative = any(not branch.text for mixture in wanted for branch in mixture.branches)
            with self.stages("text_encoder", what="prompt"):
                text = model.encode_prompt(prompts.ids[0 if negative else 1 :])
                self._done("text_encoder")
        if config.unet.reference_frame and request.pictures is not None:
            with self.stages("vae_encoder", what="picture"):
                reference = model.encode_latents(request.pictures)
        if request.normals is not None:
            with self.stages("vae_encoder", what="normal map"):
                normal_latents = model.encode_latents(request.normals)
        self._done("vae")
        with self.stages("condition"):
            return {
                mixture: model.condition(
                    text=text,
                    image_states=states,
                    image_scale=parameters.image_scale,
                    cameras=camera_vectors(request.poses) if config.unet.camera_dim else None,
                    reference=reference,
                    reference_scale=parameters.reference_scale,
                    normals=normal_latents,
                    branches=mixture.branches,
                    timesteps=[step.timestep for step in request.steps],
                )
                for mixture in wanted
            }

    def _sample(
        self,
        request: Request,
        conditions: Mapping[Mixture, Any],
        parameters: Parameters,
        on_step: Callable[[Progress], None] | None,
    ) -> NDArray[np.float32]:
        """Run the sampler from the initial latents to the final ones, both (v, h, w, c)."""
        model, plan, reports = self.model, request.steps, Reports(self.model, self.stages)
        initial, remember = request.initial(), remembered(plan)
        with self.stages("unet"):
            state = State(model.from_numpy(initial))
            kept: Any = None
            for index, (step, call) in enumerate(zip(plan, request.calls, strict=True)):
                self.stages.step = index + 1
                x, noise = state.x, None
                arguments = conditions[call.mixture], call.mixture.weights, parameters.guidance_rescale
                if call.keeps:
                    out, conditional = model.guided(x, step.timestep, *arguments)
                    kept = out + -1.0 * conditional
                else:
                    out = model.denoise(x, step.timestep, *arguments)
                if call.adds:
                    out = out + kept
                if step.noise:
                    random = np.random.default_rng([request.seed, index + 1])
                    noise = model.from_numpy(random.standard_normal(initial.shape, np.float32))
                state = advance(state, step, out, noise, remember=remember)
                progress = self._progress(index + 1, len(plan), step, state.x, (x, out))
                reports.add(index + 1, state.x, None if on_step is None else partial(on_step, progress))
            reports.finish()
            final = model.to_numpy(state.x)
            self._done("unet")
            return final

    def _decode(self, latents: A) -> NDArray[np.uint8]:
        """Pictures of latents. Raises NumericsError unless they are finite."""
        with self.stages("vae_decoder"):
            return from_model(self._pixels(latents))

    def _pixels(self, latents: A) -> NDArray[np.float32]:
        return check_views(self.model.decode(latents), "the pixels", where="decoding", dtype=self.model.dtype)

    def _progress(self, number: int, steps: int, step: Step, x: A, before: tuple[A, A]) -> Progress:
        plan = self.model.plan

        def preview() -> NDArray[np.uint8]:
            with ExitStack() as stack:
                if self.model.plan is not plan:  # its run is over, and another may be at work
                    stack.enter_context(self.alone())
                    stack.enter_context(self.model.planned(plan))
                picture = self._decode(step.x0_x * before[0] + step.x0_out * before[1])
                self._done("vae")
                return picture

        return Progress(number, steps, step.timestep, lambda: self.model.to_numpy(x), preview)
