"""Guidance per condition: its algebra, both backends on a model with text, picture and normal maps, diffusers, whole runs."""

from collections.abc import Sequence
from copy import copy
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from helpers import (
    BACKENDS,
    FLOAT32_RMS,
    Backend,
    assert_close,
    assert_different,
    from_numpy,
    normal_maps,
    record,
    to_numpy,
    with_unet,
)
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

import mvmlx.attention
import mvmlx.model
import mvtorch.attention
import mvtorch.model
from mvshared.attention import AttentionOptions
from mvshared.backend import load
from mvshared.checkpoint import read_model_config, weight_files
from mvshared.conversion.gaf import init_gaf
from mvshared.errors import OptionError
from mvshared.guidance import ALL, PLAIN, Branch, Guidance, Mixture
from mvshared.pipeline import Pipeline
from mvshared.runs import Views
from mvtorch.diffusers_model import DiffusersModel

FIXTURES = Path(__file__).parent / "fixtures"
MODELS: dict[Backend, Any] = {"torch": mvtorch.model, "mlx": mvmlx.model}
ATTENTION: dict[Backend, Any] = {"torch": mvtorch.attention, "mlx": mvmlx.attention}
ORDER = ("normals", "image", "text")
VIEWS = 2
EVERYTHING: dict[str, Any] = {"guidance": 3.0, "guidance_text": 4.0, "guidance_image": 2.5, "guidance_normals": 1.5}
MIXTURES = {
    1: Guidance(guidance=1),
    2: Guidance(guidance=3),
    3: Guidance(guidance=3, guidance_image=2),
    4: Guidance(**EVERYTHING),
}

# The algebra

strengths = st.one_of(st.just(1.0), st.floats(1, 20))
optional = st.one_of(st.none(), strengths)
guidances = st.builds(Guidance, guidance=strengths, guidance_text=optional, guidance_image=optional, guidance_normals=optional)
conditions = st.builds(Branch, st.booleans(), st.booleans(), st.booleans())


@given(guidance=guidances, there=conditions)
def test_weights_sum_to_1_and_the_last_branch_sees_everything(guidance: Guidance, there: Branch) -> None:
    branches, weights = guidance.mixture(there)
    assert sum(weights) == pytest.approx(1, abs=1e-12)
    assert branches[-1] == ALL and len(set(branches)) == len(branches) == len(weights) <= 1 + sum(there)
    assert all(weights)


@given(guidance=guidances, there=conditions, outputs=st.lists(st.floats(-5, 5), min_size=4, max_size=4))
def test_the_sum_is_that_of_instruct_pix2pix(guidance: Guidance, there: Branch, outputs: list[float]) -> None:
    """Each condition that is there leads by its weight times what it changes, after those before it."""
    joint, own = guidance.guidance, {"normals": guidance.guidance_normals or 1.0}
    own |= {"image": guidance.guidance_image or joint, "text": guidance.guidance_text or joint}
    present = [name for name in ORDER if getattr(there, name)]
    seen = Branch(*(not each for each in there))
    output = {seen: outputs[0]}
    expected = outputs[0]
    for index, name in enumerate(present, 1):
        seen = seen._replace(**{name: True})
        output[seen] = outputs[index]
        expected += own[name] * (outputs[index] - outputs[index - 1])
    branches, weights = guidance.mixture(there)
    actual = sum(weight * output[branch] for branch, weight in zip(branches, weights, strict=True))
    assert actual == pytest.approx(expected, abs=1e-9)


@given(there=conditions)
def test_where_all_guidance_is_1_only_the_conditional_branch_is_computed(there: Branch) -> None:
    assert Guidance(guidance=1).mixture(there) == PLAIN
    assert Guidance(guidance=3, guidance_text=1, guidance_image=1, guidance_normals=1).mixture(there) == PLAIN


@given(guidance=st.floats(1.01, 20), normals=st.booleans(), text=st.booleans(), image=st.booleans())
def test_the_joint_guidance_drops_text_and_pictures_together_and_keeps_the_normal_maps(
    guidance: float, normals: bool, text: bool, image: bool
) -> None:
    there = Branch(text=text, image=image, normals=normals)
    expected = Mixture((Branch(text=not text, image=not image, normals=True), ALL), (1 - guidance, guidance))
    assert Guidance(guidance=guidance).mixture(there) == (expected if text or image else PLAIN)


def test_branches_that_count_nothing_are_left_out() -> None:
    everything = Guidance(**EVERYTHING).mixture(ALL)
    assert everything.weights == pytest.approx((-0.5, -1.0, -1.5, 4.0))
    assert [sum(branch) for branch in everything.branches] == [0, 1, 2, 3]
    assert len(Guidance(guidance=3, guidance_normals=3).mixture(ALL).branches) == 2
    text_alone = Guidance(guidance=1, guidance_text=5).mixture(ALL)
    assert text_alone == Mixture((ALL._replace(text=False), ALL), (-4.0, 5.0))


@pytest.mark.parametrize(
    ("interval", "guided"),
    [
        ((0, 1), range(10)),
        ((0.2, 0.8), range(2, 8)),
        ((0.3, 0.7), range(3, 7)),
        ((0.25, 1), range(3, 10)),
        ((0, 0.05), range(1)),
        ((0.5, 0.5), ()),
        ((1, 1), ()),
    ],
)
def test_only_steps_that_begin_within_the_interval_are_guided(interval: Any, guided: Sequence[int]) -> None:
    strength = Guidance(guidance=3, guidance_interval=interval)
    mixtures = [call.mixture for call in strength.calls(ALL, steps=10)]
    assert mixtures == [strength.mixture(ALL) if step in guided else PLAIN for step in range(10)]


# The networks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GAF folder with text, image tokens, reference frame and normal maps, all of which count."""
    path = tmp_path_factory.mktemp("guidance") / "gaf"
    init_gaf(FIXTURES / "tiny-imagedream", path)
    (file,) = weight_files(path, "unet")
    weights = load_file(file)
    (name,) = [name for name, array in weights.items() if array.ndim == 4 and array.shape[1] == 8]
    weights[name] = weights[name] + 0.1 * normal(*weights[name].shape, seed=5)
    save_file(weights, file)
    return path


@cache
def loaded(folder: Path, backend: str) -> Any:
    if backend == "diffusers":
        return DiffusersModel(folder, dtype="float32", device="cpu")
    return MODELS[backend].load_model(folder, dtype="float32", device="cpu")  # type: ignore[index]


def normal(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


class Inputs:
    """What a model gets, as numpy: the states of a negative and of a positive prompt, and one of each of the rest."""

    def __init__(self, config: Any) -> None:
        self.x = normal(VIEWS, 8, 8, 4)
        self.text = normal(2, 7, config.unet.cross_attention_dim, seed=1)
        self.states = normal(1, 17, config.unet.resampler.embedding_dim, seed=2)
        self.cameras = normal(VIEWS, 16, seed=3)
        self.reference = normal(1, 8, 8, 4, seed=4)
        self.normals = normal(VIEWS, 8, 8, 4, seed=6)


def denoise(
    model: Any, mixture: Mixture, *, rescale: float = 0.0, normals: bool = True, **scales: float
) -> NDArray[np.float32]:
    given = Inputs(model.config)
    condition = model.condition(
        text=model.from_numpy(given.text),
        image_states=model.from_numpy(given.states),
        cameras=given.cameras,
        reference=model.from_numpy(given.reference),
        normals=model.from_numpy(given.normals) if normals else None,
        branches=mixture.branches,
        **scales,
    )
    return model.to_numpy(model.denoise(model.from_numpy(given.x), 481.0, condition, mixture.weights, rescale))


def by_hand(model: Any, branch: Branch) -> NDArray[np.float32]:
    """The U-Net itself, called with what a branch sees."""
    given, unet = Inputs(model.config), model.unet

    def array(x: NDArray[np.float32], seen: bool = True) -> Any:
        return from_numpy(unet, x[None] * np.float32(seen))

    with torch.no_grad():
        states = array(given.states, branch.image)
        constants = unet.constants(
            array(given.text[1 if branch.text else 0]),
            image_states=states,
            camera=array(given.cameras),
            reference=array(given.reference, branch.image),
        )
        sample = array(np.concatenate([given.x, given.normals * np.float32(branch.normals)], axis=-1))
        return to_numpy(unet(sample, unet.time_embeddings(from_numpy(unet, np.array([481.0], np.float32))), constants))[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_branch_is_a_call_of_the_network_with_what_the_branch_sees(folder: Path, backend: Backend) -> None:
    model = loaded(folder, backend)
    outputs = []
    for branch in MIXTURES[4].mixture(ALL).branches:
        outputs.append(denoise(model, Mixture((branch,), (1.0,))))
        assert_close(outputs[-1], by_hand(model, branch), rms=FLOAT32_RMS)
    for one, other in pairwise(outputs):
        assert_different(one, other, rms=1e-3)
    for strength in MIXTURES.values():
        mixture = strength.mixture(ALL)
        expected = sum(
            weight * by_hand(model, branch) for branch, weight in zip(mixture.branches, mixture.weights, strict=True)
        )
        assert_close(denoise(model, mixture), expected, rms=5 * FLOAT32_RMS)


@pytest.mark.parametrize("count", MIXTURES)
def test_a_step_of_any_number_of_branches_is_the_same_on_both_backends_and_with_diffusers(folder: Path, count: int) -> None:
    mixture = MIXTURES[count].mixture(ALL)
    assert len(mixture.branches) == count
    arguments: dict[str, Any] = {"rescale": 0.6, "image_scale": 0.8, "reference_scale": 0.4}
    ours, mlx, theirs = (denoise(loaded(folder, each), mixture, **arguments) for each in ("torch", "mlx", "diffusers"))
    assert_close(mlx, ours, rms=5 * FLOAT32_RMS)
    assert_close(ours, theirs, rms=5 * FLOAT32_RMS)


@pytest.mark.parametrize("backend", [*BACKENDS, "diffusers"])
def test_branches_without_their_text_and_weights_without_a_branch_are_refused(folder: Path, backend: str) -> None:
    model = loaded(folder, backend)
    given = Inputs(model.config)
    arguments: dict[str, Any] = {
        "image_states": model.from_numpy(given.states), "cameras": given.cameras,
        "reference": model.from_numpy(given.reference), "normals": None,
    }  # fmt: skip
    positive = model.from_numpy(given.text[1:])
    with pytest.raises(OptionError, match="text must be the states of 2 prompts, the negative one first, got 1"):
        model.condition(text=positive, branches=[ALL._replace(text=False), ALL], **arguments)
    with pytest.raises(OptionError, match="branches must be one or more"):
        model.condition(text=positive, branches=[], **arguments)
    condition = model.condition(text=positive, branches=[ALL], **arguments)
    with pytest.raises(OptionError, match="weights must be 1 numbers, one per branch"):
        model.denoise(model.from_numpy(given.x), 481.0, condition, [0.5, 0.5])


# Rescaling


@pytest.mark.parametrize("backend", BACKENDS)
def test_rescaling_is_what_diffusers_does(backend: Backend) -> None:
    guided, conditional = 3 * normal(VIEWS, 8, 6, 4), normal(VIEWS, 8, 6, 4, seed=1) + 0.2
    guided[1] *= 2
    array = torch.from_numpy if backend == "torch" else mx.array
    for share in (0.0, 0.3, 1.0):
        expected = rescale_noise_cfg(torch.from_numpy(guided), torch.from_numpy(conditional), guidance_rescale=share)
        out = MODELS[backend].rescaled(array(guided), array(conditional), share)
        assert_close(out, expected, rms=1e-6)
    zeros = np.zeros_like(guided)
    assert not to_numpy(MODELS[backend].rescaled(array(zeros), array(zeros), 0.5)).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_is_rescaled_to_the_deviation_of_the_branch_with_everything(folder: Path, backend: Backend) -> None:
    model, mixture = loaded(folder, backend), MIXTURES[4].mixture(ALL)
    guided, conditional = denoise(model, mixture), denoise(model, PLAIN)
    rescaled = denoise(model, mixture, rescale=1.0)
    np.testing.assert_allclose(rescaled.std((1, 2, 3)), conditional.std((1, 2, 3)), rtol=1e-4)
    assert (abs(guided.std((1, 2, 3)) / conditional.std((1, 2, 3)) - 1) > 0.01).all()
    assert_close(denoise(model, PLAIN, rescale=1.0), conditional, rms=1e-6)


# The weight of the reference frames

FORMS = [AttentionOptions(implementation="fused"), AttentionOptions(implementation="plain")]
FORMS += [AttentionOptions(implementation="sliced", budget_bytes=33 * 4 * 7)]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("options", FORMS, ids=lambda options: options.implementation)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_of_keys_multiplies_their_part_of_the_softmax(backend: Backend, options: AttentionOptions, half: bool) -> None:
    kind, rms = (np.float16, 2e-3) if half else (np.float32, 1e-6)
    q, k, v = (normal(2, 3, tokens, 8, seed=seed).astype(kind) for seed, tokens in enumerate((20, 33, 33)))
    array = torch.from_numpy if backend == "torch" else mx.array

    def biased(factor: float, keys: int = 33) -> Any:
        bias = np.log(np.where(np.arange(keys) < 25, 1, np.float32(factor)), dtype=np.float32)
        arrays = (array(x) for x in (q, k[:, :, :keys], v[:, :, :keys]))
        return to_numpy(ATTENTION[backend].attention(*arrays, options=options, key_bias=array(bias)))

    factors = np.array([1.0] * 25 + [0.3] * 8)
    weights = factors * np.exp(q.astype(np.float64) @ k.swapaxes(-1, -2) * 8**-0.5)
    assert_close(biased(0.3), weights / weights.sum(-1, keepdims=True) @ v, rms=rms)
    with np.errstate(divide="ignore"):
        assert_close(biased(0.0), biased(1.0, keys=25), rms=rms)


def unet_output(folder: Path, backend: Backend, options: AttentionOptions, *, references: int, scale: float) -> Any:
    unet = copy(loaded(folder, backend).unet)
    unet.attention_options = options
    given = Inputs(loaded(folder, backend).config)

    def array(x: NDArray[np.float32]) -> Any:
        return from_numpy(unet, x[None])

    with torch.no_grad():
        constants = unet.constants(
            array(given.text[1]),
            image_states=array(given.states),
            camera=array(given.cameras),
            reference=array(np.repeat(given.reference, references, axis=0)) if references else None,
            reference_scale=scale,
        )
        sample = array(np.concatenate([given.x, given.normals], axis=-1))
        return to_numpy(unet(sample, unet.time_embeddings(from_numpy(unet, np.array([481.0], np.float32))), constants))


@pytest.mark.parametrize("options", FORMS, ids=lambda options: options.implementation)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_reference_that_weighs_double_is_one_given_twice_and_one_that_weighs_nothing_is_none(
    folder: Path, backend: Backend, options: AttentionOptions
) -> None:
    def output(references: int, scale: float) -> Any:
        return unet_output(folder, backend, options, references=references, scale=scale)

    one, two, none = output(1, 1.0), output(2, 1.0), output(0, 1.0)
    assert_different(two, one, rms=1e-4)
    assert_different(none, one, rms=1e-4)
    assert_close(output(1, 2.0), two, rms=FLOAT32_RMS)
    assert_close(output(2, 0.5), one, rms=FLOAT32_RMS)
    assert_close(output(1, 0.0), none, rms=FLOAT32_RMS)
    assert_close(output(1, 1e-9), none, rms=FLOAT32_RMS)


def test_a_reference_that_weighs_nothing_is_none_for_diffusers_too(folder: Path) -> None:
    ours, theirs = (denoise(loaded(folder, each), PLAIN, reference_scale=0.0) for each in ("torch", "diffusers"))
    assert_close(ours, theirs, rms=FLOAT32_RMS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_unet_refuses_a_weight_of_references_that_is_none(folder: Path, backend: Backend) -> None:
    for scale in (-0.5, float("nan")):
        with pytest.raises(OptionError, match="reference_scale must be at least 0"):
            unet_output(folder, backend, FORMS[0], references=1, scale=scale)


# Whole runs

PICTURE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
MAPS = list(normal_maps(VIEWS, 64))
PIPELINES: dict[str, Pipeline[Any]] = {}


@pytest.fixture(params=BACKENDS)
def pipeline(request: pytest.FixtureRequest, folder: Path) -> Pipeline[Any]:
    if request.param not in PIPELINES:
        PIPELINES[request.param] = load(folder, backend=request.param, device="cpu")
    return PIPELINES[request.param]


def generate(pipeline: Pipeline[Any], **options: Any) -> Views:
    given = {"prompt": "an owl", "negative_prompt": "blurry", "normals": MAPS, "views": VIEWS, "size_px": 64, "steps": 2}
    return pipeline.generate(PICTURE, **(given | options))


def batches(pipeline: Pipeline[Any], **options: Any) -> list[int]:
    """How many branches every call of the U-Net had."""
    unet, seen = pipeline.model.unet, []  # pyright: ignore[reportAttributeAccessIssue]

    def counting(*args: Any) -> Any:
        out = unet(*args)
        seen.append(out.shape[0])
        return out

    for name in ("constants", "time_embeddings", "modules"):
        setattr(counting, name, getattr(unet, name))
    counted = with_unet(pipeline, counting)
    generate(counted, **options)
    return seen


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        (EVERYTHING, [4, 4, 4, 4]),
        (EVERYTHING | {"guidance_interval": (0.25, 0.75)}, [1, 4, 4, 1]),
        (EVERYTHING | {"guidance_interval": (0.5, 0.5)}, [1, 1, 1, 1]),
        ({"guidance": 3, "guidance_interval": (0, 0.5)}, [2, 2, 1, 1]),
        ({"guidance": 3, "guidance_text": 2}, [3, 3, 3, 3]),
        ({"guidance": 1}, [1, 1, 1, 1]),
        ({"guidance": 1, "guidance_normals": 2}, [3, 3, 3, 3]),
        ({"guidance": 3, "guidance_text": 2, "normals": None}, [3, 3, 3, 3]),
        ({"guidance": 3, "guidance_image": 1, "prompt": None, "negative_prompt": ""}, [1, 1, 1, 1]),
    ],
    ids=str,
)
def test_every_step_computes_the_branches_that_it_needs(
    pipeline: Pipeline[Any], options: dict[str, Any], counts: list[int]
) -> None:
    assert batches(pipeline, steps=4, **options) == counts


def test_every_step_gets_the_weights_of_its_branches_and_the_rescaling(pipeline: Pipeline[Any]) -> None:
    recorded = record(pipeline)
    options: dict[str, Any] = {"guidance_interval": (0.5, 1), "guidance_rescale": 0.3, **EVERYTHING}
    generate(recorded.pipeline, **options)
    plain, guided = recorded.model.arguments("denoise")
    assert (plain[3], plain[4]) == ((1.0,), 0.3)
    assert guided[3] == Guidance(**EVERYTHING).mixture(ALL).weights
    assert [len(arguments[2].branches) for arguments in (plain, guided)] == [1, 4]


def test_what_stays_constant_is_computed_once_for_every_mixture_of_branches(pipeline: Pipeline[Any]) -> None:
    recorded = record(pipeline)
    generate(recorded.pipeline, steps=4, guidance=3, guidance_interval=(0.5, 1))
    assert [len(recorded.model.arguments(name)) for name in ("denoise", "condition")] == [4, 2]


@pytest.mark.parametrize(
    "change",
    [
        {"guidance_text": 6.0},
        {"guidance_image": 6.0},
        {"guidance_normals": 6.0},
        {"guidance_interval": (0.5, 1)},
        {"guidance_rescale": 0.5},
        {"guidance_every": 2},
        {"kv_pooling": 2},
        {"reference_scale": 0.5},
        {"reference_scale": 0.0},
        {"image_scale": 0.5},
    ],
    ids=str,
)
def test_every_option_changes_the_result(pipeline: Pipeline[Any], change: dict[str, Any]) -> None:
    assert_different(generate(pipeline, **change).latents, generate(pipeline).latents, rms=1e-4)


def test_both_backends_make_the_same_views_with_every_option(folder: Path) -> None:
    options: dict[str, Any] = {"guidance_interval": (0.5, 1), "guidance_rescale": 0.3, "reference_scale": 1.5, **EVERYTHING}
    expected, actual = (generate(load(folder, backend=each, device="cpu"), **options).latents for each in BACKENDS)
    assert_close(actual, expected, rms=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_normals": 2, "normals": None}, "guidance_normals must be left out: no normal maps given, got 2"),
        (
            {"guidance_text": 2, "prompt": None, "negative_prompt": ""},
            "guidance_text must be left out: no prompt given, got 2",
        ),
    ],
    ids=str,
)
def test_guidance_to_what_is_not_given_is_refused_before_any_work(
    pipeline: Pipeline[Any], options: dict[str, Any], message: str
) -> None:
    recorded = record(pipeline)
    with pytest.raises(OptionError, match=message):
        generate(recorded.pipeline, **options)
    assert not recorded.model.calls


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("demo", {"guidance_text": 2}, "guidance_text must be left out: this model takes no prompt"),
        ("demo", {"image_scale": 0.5}, "image_scale must be 1: this model has no image tokens"),
        ("tiny-mvdream", {"guidance_image": 2}, "guidance_image must be left out: this model takes no picture"),
        ("tiny-mvdream", {"guidance_normals": 2}, "guidance_normals must be left out: this model takes no normal maps"),
        ("tiny-mvdream", {"reference_scale": 0.5}, "reference_scale must be 1: this model has no reference frame"),
        ("tiny-mvdream", {"image_scale": 0.5}, "image_scale must be 1: this model has no image tokens"),
    ],
    ids=str,
)
def test_what_a_model_has_nothing_for_is_refused_before_any_work(name: str, options: dict[str, Any], message: str) -> None:
    recorded = record(load("demo" if name == "demo" else FIXTURES / name, backend="torch", device="cpu"))
    given = (PICTURE,) if name == "demo" else ()
    with pytest.raises(OptionError, match=message):
        recorded.pipeline.generate(*given, prompt=None if name == "demo" else "an owl", **options)
    assert not recorded.model.calls


def test_guidance_to_a_picture_says_whether_none_is_given_or_none_is_taken() -> None:
    there = Branch(text=True, image=False, normals=False)
    for name, why in (("tiny-imagedream", "no picture given"), ("tiny-mvdream", "this model takes no picture")):
        with pytest.raises(OptionError, match=f"guidance_image must be left out: {why}, got 2"):
            Guidance(guidance=2, guidance_image=2).check_there(there, read_model_config(FIXTURES / name))
