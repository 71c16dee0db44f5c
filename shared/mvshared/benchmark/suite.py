"""Which cases there are, by the names of the command line."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mvshared.benchmark import cases, commands
from mvshared.benchmark.against import against_group, warm_up_of
from mvshared.benchmark.compare import Case
from mvshared.benchmark.flops import (
    Frames,
    attended_tokens,
    condition_flops,
    run_flops,
    unet_flops,
    upscaler_flops,
    vae_flops,
)
from mvshared.benchmark.models import X2_UPSCALER, Measured
from mvshared.benchmark.settings import PROCESS_BYTES, Needs, Place, Settings
from mvshared.benchmark.worker import Prepared
from mvshared.config import ModelConfig
from mvshared.upscaling.latents import FACTOR

TITLES = {
    "start": "Start of the command line",
    "matmul": "Products of square matrices: the peak that shares are of",
    "load": "Loading",
    "condition": "What is constant over the steps of a run",
    "step": "One denoising step",
    "vae": "VAE",
    "upscaler": "One step of the x2 latent upscaler, random weights",
    "run": "A whole run",
    "against": "The same work from diffusers, in turns",
}
MATMUL_SIZES = (1024, 2048)
MATMUL_SIZES_OF = {"cuda": (2048, 4096, 8192), "gpu": (2048, 4096, 8192)}
SLOW_MATMUL_SIZES = (512, 1024)  # of MLX's CPU backend


@dataclass(frozen=True, kw_only=True)
class Suite:
    """The cases of settings that `resolved` gave, at one place."""

    settings: Settings
    found: Measured
    place: Place
    needs: Needs

    @property
    def config(self) -> ModelConfig:
        return self.found.config

    @property
    def arguments(self) -> dict[str, Any]:
        """Of every case that loads the model."""
        return {"model": self.found.name, **self.place._asdict()}

    @property
    def run_guidance(self) -> float:
        """Of whole runs: the model's own, or none."""
        return 1.0 if self.settings.guidance == "off" else self.config.defaults.guidance

    def small_in_float32(self) -> "Suite":
        """The same suite for at most two small views in float32, eager sides alone, where every part of the work shows."""
        side = 2 * self.config.vae.downscale * self.config.unet.downscale
        place = self.place._replace(dtype="float32")
        settings = replace(self.settings, views=(min(2, max(self.settings.views)),), sizes_px=(side,), compiled=None)
        return replace(self, settings=settings, place=place, needs=Needs(self.found, place))

    def matmul(self) -> list[Case]:
        """Products that say what the device can do."""
        kind = self.place.device.partition(":")[0]
        sizes = MATMUL_SIZES_OF.get(kind, MATMUL_SIZES)
        if (self.place.backend, kind) == ("mlx", "cpu"):
            sizes = SLOW_MATMUL_SIZES
        return [
            Case(
                what=f"{size} x {size}",
                prepare=cases.matmul,
                arguments={"size": size, **self.place._asdict()},
                row={"flops": 2 * size**3},
            )
            for size in sizes
        ]

    def cases(self, name: str) -> Iterator[Case]:
        """The cases of a name of NAMES, but `start`, which has no place."""
        makers: dict[str, Callable[[], Iterator[Case]]] = {
            "load": self._load,
            "condition": self._condition,
            "step": self._step,
            "vae": self._vae,
            "upscaler": self._upscaler,
            "run": self._run,
        }
        return makers[name]()

    def against(self) -> list[list[Case]]:
        """Groups of the same work, ours first: a guided step of each number of views, and decoding the most of them."""
        groups = []
        for size_px in self.settings.sizes_px:
            work = [("step", views, case) for views, case in self._steps(size_px, guided=True)]
            most = max(self.settings.views)
            work.append(("decode", most, self._vae_case("decode", cases.vae_decode, views=most, size_px=size_px)))
            groups += [
                against_group(
                    call,
                    repeated_flops=0 if call == "decode" else self._repeated_flops(views),
                    what=case.what,
                    views=views,
                    size_px=size_px,
                    guided=True,
                    compiled=self.settings.compiled,
                    row=dict(case.row),
                    needed_bytes=case.needed_bytes,
                    **self.arguments,
                )
                for call, views, case in work
            ]
        return groups

    def _load(self) -> Iterator[Case]:
        refused = "" if self.found.folder else "random weights are in no file"
        needed = self.needs.run(views=1, size_px=self.config.defaults.size_px)
        yield Case(
            what=f"load {self.found.name}",
            prepare=cases.loading,
            arguments=self.arguments,
            needed_bytes=needed,
            refused=refused,
        )

    def _condition(self) -> Iterator[Case]:
        views, size_px = self._views, self.settings.sizes_px[0]
        for guided in self.settings.guided:
            yield self._unet_case(
                "condition", cases.condition, views=views, size_px=size_px, guided=guided, flops=self._condition_flops(guided)
            )

    def _step(self) -> Iterator[Case]:
        for size_px in self.settings.sizes_px:
            for guided in self.settings.guided:
                yield from (case for _, case in self._steps(size_px, guided=guided))

    def _steps(self, size_px: int, *, guided: bool) -> Iterator[tuple[int, Case]]:
        """The step of each number of views."""
        for views in self.settings.views:
            flops = step_flops(self.config, views=views, size_px=size_px, guided=guided)
            yield views, self._unet_case("step", cases.step, views=views, size_px=size_px, guided=guided, flops=flops)

    def _vae(self) -> Iterator[Case]:
        for size_px in self.settings.sizes_px:
            yield self._vae_case("encode", cases.vae_encode, views=self._views, size_px=size_px)
            yield self._vae_case("decode", cases.vae_decode, views=self._views, size_px=size_px)

    def _vae_case(self, what: str, prepare: Callable[..., Prepared], *, views: int, size_px: int) -> Case:
        flops = views * vae_flops(self.config.vae, size_px=size_px, decoder=what == "decode").all
        return Case(
            what=f"{what}, {sized(views, size_px)}",
            prepare=prepare,
            arguments={**self.arguments, "views": views, "size_px": size_px},
            row={"flops": flops, "views": views, "size_px": size_px},
            needed_bytes=self.needs.stage("vae_decoder", views=views, size_px=size_px, guided=False),
            warm_up=warm_up_of(self.place.device),
        )

    def _upscaler(self) -> Iterator[Case]:
        text = X2_UPSCALER.text_encoder
        for size_px in self.settings.sizes_px:
            side, views = FACTOR * size_px // X2_UPSCALER.vae.downscale, self._views
            tokens = 0 if text is None else text.max_position_embeddings
            flops = upscaler_flops(X2_UPSCALER.unet, branches=1, views=views, side=side, tokens=tokens)
            yield Case(
                what=f"upscaler's step, {sized(views, size_px)} to {FACTOR * size_px}",
                prepare=cases.upscaler_step,
                arguments={**self.place._asdict(), "views": views, "size_px": size_px},
                row={"flops": flops.all, "views": views, "size_px": size_px},
                needed_bytes=2 * PROCESS_BYTES + 4 * 373_000_000,
                warm_up=warm_up_of(self.place.device),
            )

    def _run(self) -> Iterator[Case]:
        config, steps = self.config, self.settings.steps
        assert steps is not None
        views = self._views if config.defaults.views > 1 else 1
        for size_px in self.settings.sizes_px:
            arguments = {**self.arguments, "views": views, "size_px": size_px, "steps": steps, "guidance": self.run_guidance}
            branches = 2 if self.run_guidance > 1 else 1
            flops = run_flops(config, views=views, size_px=size_px, steps=steps, branches=branches).all
            row = {"flops": flops, "views": views, "size_px": size_px, "steps": steps}
            needed, words = self.needs.run(views=views, size_px=size_px), f"{sized(views, size_px)}, {steps} steps"
            words += ", not guided" if branches == 1 else ""
            if self.found.folder is not None:
                yield Case(
                    what=f"cold: mvmlx generate, {words}",
                    prepare=commands.generate,
                    arguments=arguments,
                    row=row,
                    needed_bytes=needed,
                )
            yield Case(
                what=f"warm: loaded model, {words}",
                prepare=cases.generation,
                arguments=arguments,
                row=row,
                needed_bytes=needed,
            )

    @property
    def _views(self) -> int:
        """Of the cases that are measured for one number of views."""
        views, own = self.settings.views, self.config.defaults.views
        return own if own in views else views[0]

    def _unet_case(
        self, what: str, prepare: Callable[..., Prepared], *, views: int, size_px: int, guided: bool, flops: int
    ) -> Case:
        return Case(
            what=f"{what}, {sized(views, size_px)}{', guided' if guided else ''}",
            prepare=prepare,
            arguments={**self.arguments, "views": views, "size_px": size_px, "guided": guided},
            row={"flops": flops, "views": views, "size_px": size_px},
            needed_bytes=self.needs.stage("unet", views=views, size_px=size_px, guided=guided),
            warm_up=warm_up_of(self.place.device),
        )

    def _repeated_flops(self, views: int) -> int:
        """Keys and values of what is attended to, which diffusers makes for every frame of a guided step anew."""
        return self._condition_flops(guided=True, frames=views + self.config.unet.reference_frame)

    def _condition_flops(self, guided: bool, *, frames: int = 1) -> int:
        text, vision = self.config.text_encoder, self.config.image_encoder
        return condition_flops(
            self.config.unet,
            branches=2 if guided else 1,
            text_tokens=0 if text is None else text.max_position_embeddings,
            pictures=0 if vision is None else 1,
            states=0 if vision is None else vision.tokens,
            frames=frames,
        ).all


def step_flops(config: ModelConfig, *, views: int, size_px: int, guided: bool) -> int:
    """Of one step with a picture, if the model takes one."""
    pictures = 1 if config.unet.takes_pictures else 0
    frames = Frames(2 if guided else 1, views, pictures if config.unet.reference_frame else 0, size_px // config.vae.downscale)
    return unet_flops(config.unet, frames, tokens=attended_tokens(config, pictures=pictures)).all


def sized(views: int, size_px: int) -> str:
    """In words."""
    return f"{views} view{'s' if views > 1 else ''} of {size_px} px"


def start_case() -> Case:
    """`mvmlx --help`."""
    return Case(what="mvmlx --help, new process", prepare=commands.help_text)


def grouped(suites: Sequence[Suite], name: str) -> list[list[Case]]:
    """The cases of a name, those of the same work and dtype in all backends together."""
    groups: dict[tuple[str, str], list[Case]] = {}
    for suite in suites:
        for case in suite.cases(name):
            groups.setdefault((case.what, suite.place.dtype), []).append(case)
    return list(groups.values())


def refuse(case: Case, reason: str) -> Case:
    """The case, not to be run for a reason, if there is one."""
    return replace(case, refused=case.refused or reason)
