"""Classifier-free guidance (arXiv 2207.12598) with a weight per condition, as a weighted sum of the network's outputs.

The conditions are added one after the other, normal maps, pictures, text: equation 3 of InstructPix2Pix (arXiv 2211.09800) for
any number of conditions. Rescaling is section 3.4 of arXiv 2305.08891; guidance in a part of the run is arXiv 2404.07724.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mvshared.config import ModelConfig, UNetConfig
from mvshared.errors import OptionError
from mvshared.numbers import number, whole

GUIDANCE_RANGE = (1.0, 20.0)
SCALE_RANGE = (0.0, 2.0)
MAX_EVERY = 1000


class Branch(NamedTuple):
    """A call of the network, by what it sees: the text, the pictures (tokens and reference frames), the normal maps.

    In the place of the text stands the negative prompt, in that of the others zeros.
    """

    text: bool
    image: bool
    normals: bool


ALL = Branch(text=True, image=True, normals=True)


class Mixture(NamedTuple):
    """What a step computes: the branches, the last one with all conditions, and what their outputs are multiplied by."""

    branches: tuple[Branch, ...]
    weights: tuple[float, ...]


PLAIN = Mixture((ALL,), (1.0,))


def frames_are_alike(branches: Sequence[Branch], *, references: bool, normals: bool) -> bool:
    """Whether the network is given the same frames in all branches, which then differ only in what the frames attend to.

    `references` and `normals`: whether there are reference frames and normal maps, which a branch may not see."""
    seen = {(references and branch.image, normals and branch.normals) for branch in branches}
    return len(seen) == 1


class Call(NamedTuple):
    """How a step calls the network. `keeps` says that later steps add the guidance of this one, what it changes in the output
    of the branch with all conditions; `adds` that this step adds the last one that was kept."""

    mixture: Mixture
    keeps: bool = False
    adds: bool = False


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How far the result is led towards each condition; 1 is as far as the network goes by itself.

    `guidance_text` and `guidance_image` are `guidance` unless given, `guidance_normals` is 1. `guidance_interval` are shares of
    the sampling run, from 0 to 1: a step that begins outside [start, end) is not guided. `guidance_every` n computes it in
    every n-th of the guided steps, from the first one on; the others add that of the last such step. `guidance_rescale` from 0
    to 1 is how much of the deviation of the guided output is brought back to that of the conditional one. Raises OptionError.
    """

    guidance: float
    guidance_text: float | None = None
    guidance_image: float | None = None
    guidance_normals: float | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_every: int = 1
    guidance_rescale: float = 0.0

    def __post_init__(self) -> None:
        def store(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        store("guidance", number("guidance", self.guidance, *GUIDANCE_RANGE))
        for name in ("guidance_text", "guidance_image", "guidance_normals"):
            if getattr(self, name) is not None:
                store(name, number(name, getattr(self, name), *GUIDANCE_RANGE))
        store("guidance_interval", _interval(self.guidance_interval))
        store("guidance_every", whole("guidance_every", self.guidance_every, 1, MAX_EVERY))
        store("guidance_rescale", number("guidance_rescale", self.guidance_rescale, 0, 1))

    def mixture(self, there: Branch) -> Mixture:
        """What a guided step computes for the conditions that are there; one that is not drops out.

        With weights w of the conditions 1 to k, the branch with the first j of them counts w_j - w_(j+1), where w_0 is 1 and
        w_(k+1) is 0. Branches that count nothing are left out.
        """
        joint, weights = self.guidance, {"normals": 1.0 if self.guidance_normals is None else self.guidance_normals}
        weights["image"] = joint if self.guidance_image is None else self.guidance_image
        weights["text"] = joint if self.guidance_text is None else self.guidance_text
        branch, before, parts = Branch(*(not each for each in there)), 1.0, []
        for name, weight in weights.items():
            if getattr(there, name):
                parts.append((branch, before - weight))
                branch, before = branch._replace(**{name: True}), weight
        parts = [part for part in (*parts, (branch, before)) if part[1]]
        return Mixture(tuple(branch for branch, _ in parts), tuple(weight for _, weight in parts))

    def calls(self, there: Branch, *, steps: int) -> list[Call]:
        """How every step calls the network: with all conditions alone outside of the interval and where guidance is re-used."""
        (start, end), every, guided = self.guidance_interval, self.guidance_every, self.mixture(there)
        inside = [step for step in range(steps) if start <= step / steps < end]
        result = [Call(PLAIN)] * steps
        for index, step in enumerate(inside if guided != PLAIN else []):
            again = index % every != 0
            keeps = not again and every > 1 and index + 1 < len(inside)
            result[step] = Call(PLAIN, adds=True) if again else Call(guided, keeps=keeps)
        return result

    def check_there(self, there: Branch, config: ModelConfig) -> None:
        """Raise OptionError for the guidance of a condition that is not there: the model takes none, or none is given."""
        takes = {
            "text": config.text_encoder is not None,
            "image": config.unet.takes_pictures,
            "normals": bool(config.unet.normal_channels),
        }
        words = {"text": "prompt", "image": "picture", "normals": "normal maps"}
        for name, word in words.items():
            given = getattr(self, f"guidance_{name}")
            if given is not None and not getattr(there, name):
                why = f"no {word} given" if takes[name] else f"this model takes no {word}"
                raise OptionError(f"guidance_{name}", expected=f"left out: {why}", got=given)


def _interval(given: object) -> tuple[float, float]:
    pair = given.tolist() if isinstance(given, np.ndarray) else given
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise OptionError("guidance_interval", expected="two numbers from 0 to 1, start and end", got=given)
    start, end = (number("guidance_interval", each, 0, 1) for each in pair)
    if start > end:
        raise OptionError("guidance_interval", expected="a start that is not after the end", got=given)
    return start, end


def check_scales(config: UNetConfig, *, image_scale: float, reference_scale: float) -> dict[str, float]:
    """Both as floats. Raises OptionError out of bounds, and for another value than 1 where there is nothing to weigh."""
    scales = {"image_scale": image_scale, "reference_scale": reference_scale}
    scales = {name: number(name, value, *SCALE_RANGE) for name, value in scales.items()}
    weighed = {"image_scale": (config.resampler is not None, "image tokens")}
    weighed["reference_scale"] = (config.reference_frame, "reference frame")
    for name, (there, what) in weighed.items():
        if scales[name] != 1 and not there:
            raise OptionError(name, expected=f"1: this model has no {what}", got=scales[name])
    return scales


def check_branches(branches: Sequence[Branch], *, texts: int | None) -> None:
    """Raise OptionError without branches, or for one that lacks its text states: `texts` is how many there are, at most 2."""
    if not branches:
        raise OptionError("branches", expected="one or more", got=branches)
    needed = 1 if all(branch.text for branch in branches) else 2
    if texts is not None and texts < needed:
        raise OptionError("text", expected=f"the states of {needed} prompts, the negative one first", got=texts)


def check_weights(weights: Sequence[float], *, branches: Sequence[Branch]) -> None:
    """Raise OptionError unless there is a weight per branch."""
    if len(weights) != len(branches):
        raise OptionError("weights", expected=f"{len(branches)} numbers, one per branch", got=weights)
