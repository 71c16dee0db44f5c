"""Training steps: MLX against PyTorch from the same weights and batches, and what a trainer promises on both."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import BACKENDS, TINY_UNET, TINY_VAE, Backend, assert_close, assert_different, gradients
from numpy.typing import NDArray

import mvmlx.train
import mvtorch.model
import mvtorch.train
from mvshared.config import KUNetConfig, ResamplerConfig
from mvshared.errors import BackendError, OptionError, TensorMismatchError
from mvshared.training.config import OptimizerConfig, UNetLossConfig, VAELossConfig
from mvshared.training.data import UNetBatch, VAEBatch
from mvshared.training.initial import initial_weights
from mvshared.training.optimizer import ema_decay
from mvshared.training.upscaler_data import UpscalerBatch
from mvtorch.vae import Moments

MODULES: dict[Backend, Any] = {"torch": mvtorch.train, "mlx": mvmlx.train}
STAGES = ("vae", "unet", "gaf", "upscaler")
UNET = replace(
    TINY_UNET, in_channels=8, camera_dim=16, reference_frame=True, cross_attention_dim=None, block_out_channels=(16, 32)
)
RESAMPLER = ResamplerConfig(embedding_dim=12, output_dim=16, hidden_dim=16, depth=1, heads=2, dim_head=8, num_queries=3)
GAF = replace(UNET, cross_attention_dim=16, resampler=RESAMPLER)
UNETS = {"unet": UNET, "gaf": GAF}
VAE = replace(TINY_VAE, block_out_channels=(8, 16), mid_block_add_attention=True)
UPSCALER = KUNetConfig(block_out_channels=(32, 64), layers_per_block=1, attention_levels=(False, False), time_cond_proj_dim=6)
LOSS = VAELossConfig(kl_weight=0.1, border_weight=2.0, detail_weight=3.0)  # large enough to count in a comparison
UNET_LOSSES = {"unet": UNetLossConfig(), "gaf": UNetLossConfig(detail_weight=3.0)}  # one of them weighs detail

# Adam's first step is nearly the gradient's sign: with eps far below the gradients, rounding of those near zero decides on
# whole steps. An eps of their size keeps the update as smooth as the gradient.
SMOOTH = OptimizerConfig(learning_rate=1e-2, eps=1e-2, ema_decay=0.9, gradient_clip=0.5, weight_decay=0.1)
LEARNING_RATES = (1e-2, 2e-2, 5e-3)
LOSS_RTOL = 1e-5
UPDATE_RMS = 1e-4


def normal(*shape: int, seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def make_batch(stage: str, seed: int = 0) -> Any:
    if stage == "vae":
        random = np.random.default_rng(seed)
        pixels = random.uniform(-1, 1, (2, 8, 12, 3)).astype(np.float32)
        foreground, noise = random.random((2, 8, 12), np.float32), random.standard_normal((2, 4, 6, 4), np.float32)
        return VAEBatch(pixels, foreground, noise, detail=random.random((2, 8, 12), np.float32))
    if stage == "upscaler":
        return UpscalerBatch(
            sample=normal(2, 1, 4, 6, 8, seed=seed),
            noise=normal(2, seed=seed + 1),
            condition=normal(2, 6, seed=seed + 2),
            target=normal(2, 1, 4, 6, 4, seed=seed + 3),
        )
    return UNetBatch(
        sample=normal(2, 2, 4, 6, 8, seed=seed),
        timesteps=np.array([20.0, 700.0], np.float32),
        camera=normal(2, 2, 16, seed=seed + 1),
        reference=normal(2, 4, 6, 4, seed=seed + 2),
        target=normal(2, 2, 4, 6, 4, seed=seed + 3),
        text=normal(2, 5, 16, seed=seed + 4) if stage == "gaf" else None,
        image_states=normal(2, 7, 12, seed=seed + 5) if stage == "gaf" else None,
        detail=np.random.default_rng(seed + 6).random((2, 2, 4, 6), np.float32) if stage == "gaf" else None,
    )


def make_weights(stage: str) -> dict[str, NDArray[np.float32]]:
    if stage == "upscaler":
        return initial_weights(mvtorch.model.network_shapes(UPSCALER), seed=0)
    shapes = mvtorch.model.network_shapes(VAE) if stage == "vae" else mvtorch.model.network_shapes(UNETS[stage])
    return initial_weights(shapes, seed=0)


def make_trainer(backend: Backend, stage: str, config: OptimizerConfig = SMOOTH, **options: Any) -> Any:
    module, weights = MODULES[backend], options.pop("weights", None) or make_weights(stage)
    options = {"device": "cpu"} | options
    if stage == "vae":
        return module.vae_trainer(VAE, config, LOSS, weights, **options)
    if stage == "upscaler":
        return module.upscaler_trainer(UPSCALER, config, weights, **options)
    return module.unet_trainer(UNETS[stage], config, weights, loss=UNET_LOSSES[stage], **options)


def on_backend(backend: Backend, batch: Any) -> Any:
    wrap: Any = mx.array if backend == "mlx" else torch.from_numpy
    return type(batch)(*(None if array is None else wrap(array) for array in batch))


def run(trainer: Any, stage: str, steps: int) -> list[Any]:
    first = trainer.steps
    return [
        trainer.step(make_batch(stage, seed=step), learning_rate=LEARNING_RATES[step]) for step in range(first, first + steps)
    ]


def joined(weights: dict[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    return np.concatenate([weights[name].ravel() for name in sorted(weights)])


# Both backends take the same steps


@pytest.mark.parametrize("stage", STAGES)
def test_losses_and_gradient_norms_are_the_same_on_both_backends(stage: str) -> None:
    ours, theirs = (run(make_trainer(name, stage), stage, 3) for name in ("mlx", "torch"))
    np.testing.assert_allclose(np.array(ours), np.array(theirs), rtol=LOSS_RTOL)
    assert all(result.gradient_norm > SMOOTH.gradient_clip for result in theirs), "clipping was not tested"


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_the_updates_of_the_weights_are_the_same_on_both_backends(stage: str, steps: int) -> None:
    start = joined(make_weights(stage))
    ours, theirs = (make_trainer(name, stage) for name in ("mlx", "torch"))
    for trainer in (ours, theirs):
        run(trainer, stage, steps)
    assert_close(joined(ours.weights()) - start, joined(theirs.weights()) - start, rms=UPDATE_RMS)
    assert_close(joined(ours.ema_weights()) - start, joined(theirs.ema_weights()) - start, rms=UPDATE_RMS)
    found = ours.weights()
    for name, weights in theirs.weights().items():
        np.testing.assert_allclose(found[name], weights, atol=1e-5, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("stage", STAGES)
def test_with_the_default_eps_the_weights_are_the_same_but_for_gradients_near_zero(stage: str) -> None:
    ours, theirs = (make_trainer(name, stage, OptimizerConfig()) for name in ("mlx", "torch"))
    for trainer in (ours, theirs):
        trainer.step(make_batch(stage), learning_rate=1e-3)
    assert_close(joined(ours.weights()), joined(theirs.weights()), rms=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_are_the_same_on_both_backends(stage: str) -> None:
    found: dict[str, dict[str, NDArray[Any]]] = {}
    for name in BACKENDS:
        trainer = make_trainer(name, stage)
        arrays = on_backend(name, make_batch(stage))
        found[name] = gradients(trainer.network, lambda network, t=trainer, a=arrays: t.loss(network, a))
    assert found["mlx"].keys() == found["torch"].keys() == make_weights(stage).keys()
    for name, expected in found["torch"].items():
        np.testing.assert_allclose(found["mlx"][name], expected, atol=1e-5 * max(1.0, np.abs(expected).max()), err_msg=name)


@pytest.mark.parametrize("stage", STAGES)
def test_gradient_checkpointing_changes_nothing_but_memory(stage: str) -> None:
    for backend in BACKENDS:
        plain, saving = (make_trainer(backend, stage, gradient_checkpointing=value) for value in (False, True))
        assert [trainer.network.gradient_checkpointing for trainer in (plain, saving)] == [False, True]
        results = [run(trainer, stage, 2) for trainer in (plain, saving)]
        np.testing.assert_allclose(np.array(results[0]), np.array(results[1]), rtol=1e-6)
        assert_close(joined(saving.weights()), joined(plain.weights()), rms=1e-6)


@pytest.mark.parametrize("first", BACKENDS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_starts_in_one_backend_goes_on_in_the_other(first: Backend, stage: str) -> None:
    second: Backend = "mlx" if first == "torch" else "torch"
    start = make_trainer(first, stage)
    run(start, stage, 2)
    goes_on = make_trainer(second, stage, weights={name: array * 0 for name, array in make_weights(stage).items()})
    goes_on.load_state(start.state())
    assert goes_on.steps == 2
    run(goes_on, stage, 1)
    run(start, stage, 1)
    for ours, theirs in ((goes_on.weights(), start.weights()), (goes_on.ema_weights(), start.ema_weights())):
        assert_close(joined(ours), joined(theirs), rms=1e-5)
    state, expected = goes_on.state(), start.state()
    for part in ("exp_avg.", "exp_avg_sq."):
        ours, theirs = ({name: array for name, array in s.items() if name.startswith(part)} for s in (state, expected))
        assert_close(joined(ours), joined(theirs), rms=UPDATE_RMS)


# What a trainer promises


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stage", STAGES)
def test_state_comes_back_bit_for_bit_and_training_goes_on_bit_for_bit(backend: Backend, stage: str) -> None:
    trainer, resumed = (make_trainer(backend, stage) for _ in range(2))
    run(trainer, stage, 2)
    state = trainer.state()
    resumed.load_state(state)
    again = resumed.state()
    assert again.keys() == state.keys()
    for name, array in state.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(again[name], array, strict=True)
    for each in (trainer, resumed):
        run(each, stage, 1)
    np.testing.assert_array_equal(joined(resumed.state()), joined(trainer.state()))


def test_states_have_the_same_names_and_shapes_on_both_backends() -> None:
    for stage in STAGES:
        shapes = [{name: array.shape for name, array in make_trainer(b, stage).state().items()} for b in BACKENDS]
        assert shapes[0] == shapes[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_state_of_another_network_is_refused(backend: Backend) -> None:
    trainer = make_trainer(backend, "unet")
    state = trainer.state()
    before = joined(state)
    for edit in ({"ema.conv_in.bias": np.zeros(3, np.float32)}, {"ema.other": np.zeros(3, np.float32)}):
        with pytest.raises(TensorMismatchError, match=next(iter(edit))):
            trainer.load_state(state | edit)
    with pytest.raises(TensorMismatchError, match="missing: steps"):
        trainer.load_state({name: array for name, array in state.items() if name != "steps"})
    np.testing.assert_array_equal(joined(trainer.state()), before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stage", STAGES)
def test_evaluation_uses_the_average_and_changes_nothing(backend: Backend, stage: str) -> None:
    trainer = make_trainer(backend, stage)
    run(trainer, stage, 2)
    before = trainer.state()
    loss = trainer.evaluate(make_batch(stage, seed=9))
    after = trainer.state()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)
    averaged = make_trainer(backend, stage, weights=trainer.ema_weights())
    assert averaged.step(make_batch(stage, seed=9), learning_rate=0.0).loss == pytest.approx(loss, rel=1e-6)
    own = make_trainer(backend, stage, weights=trainer.weights())
    assert own.step(make_batch(stage, seed=9), learning_rate=0.0).loss != pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stage", STAGES)
def test_what_is_measured_is_what_the_next_step_finds_and_nothing_is_learned(backend: Backend, stage: str) -> None:
    trainer, batch = make_trainer(backend, stage), make_batch(stage, seed=3)
    trainer.step(make_batch(stage, seed=2), learning_rate=1e-3)
    before = trainer.state()
    measured = trainer.measure(batch)
    for name, array in trainer.state().items():
        np.testing.assert_array_equal(array, before[name])
    assert measured == trainer.step(batch, learning_rate=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stage", ["vae", "gaf", "upscaler"])
def test_the_random_numbers_of_the_program_around_go_on_as_if_nothing_was_trained(backend: Backend, stage: str) -> None:
    def draw() -> list[Any]:
        return [torch.rand(()).item(), mx.random.uniform().item()]

    torch.manual_seed(7)
    mx.random.seed(7)
    expected = draw()
    torch.manual_seed(7)
    mx.random.seed(7)
    run(make_trainer(backend, stage), stage, 1)
    assert draw() == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_failed_evaluation_leaves_the_weights(backend: Backend) -> None:
    trainer = make_trainer(backend, "unet")
    run(trainer, "unet", 1)
    before = trainer.weights()
    with pytest.raises(OptionError):
        trainer.evaluate(make_batch("unet")._replace(timesteps=np.zeros(5, np.float32)))
    np.testing.assert_array_equal(joined(trainer.weights()), joined(before))
    weights = MODULES[backend].unet_trainer(UNET, SMOOTH, before, device="cpu")
    assert trainer.step(make_batch("unet"), learning_rate=0.0).loss == weights.step(make_batch("unet"), learning_rate=0.0).loss


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_failed_step_leaves_the_trainer_as_it_was(backend: Backend) -> None:
    trainer, untouched = (make_trainer(backend, "unet") for _ in range(2))
    with pytest.raises(OptionError):
        trainer.step(make_batch("unet")._replace(timesteps=np.zeros(5, np.float32)), learning_rate=0.1)
    for each in (trainer, untouched):
        run(each, "unet", 1)
    np.testing.assert_array_equal(joined(trainer.state()), joined(untouched.state()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_may_be_of_views_that_run_backwards(backend: Backend) -> None:
    forwards, backwards = (make_trainer(backend, "unet") for _ in range(2))
    batch = make_batch("unet")
    expected = forwards.step(batch, learning_rate=0.1)
    same = type(batch)(*(None if array is None else np.flip(np.flip(array).copy()) for array in batch))
    assert backwards.step(same, learning_rate=0.1) == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_average_follows_the_weights_with_the_decay_of_its_step(backend: Backend) -> None:
    trainer = make_trainer(backend, "unet")
    expected = joined(make_weights("unet")).astype(np.float64)
    for step in range(3):
        run(trainer, "unet", 1)
        decay = ema_decay(SMOOTH, step + 1)
        expected = decay * expected + (1 - decay) * joined(trainer.weights())
    assert_close(joined(trainer.ema_weights()), expected, rms=1e-6)
    assert_different(joined(trainer.ema_weights()), joined(trainer.weights()), rms=1e-4)


def test_the_decay_of_the_average_grows_to_its_limit() -> None:
    config = OptimizerConfig(ema_decay=0.9)
    assert [ema_decay(config, steps) for steps in (1, 2)] == [2 / 11, 3 / 12]
    assert ema_decay(config, 79) == pytest.approx(80 / 89)
    assert ema_decay(config, 90) == ema_decay(config, 10**6) == 0.9


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_is_that_of_adamw(backend: Backend) -> None:
    """Against the formulas of arXiv 1711.05101, in float64, from the trainer's own gradients."""
    trainer = make_trainer(backend, "unet")
    weights = {name: array.astype(np.float64) for name, array in make_weights("unet").items()}
    first, second = ({name: np.zeros_like(array) for name, array in weights.items()} for _ in range(2))
    (b1, b2), eps = SMOOTH.betas, SMOOTH.eps
    for step in range(3):
        arrays = on_backend(backend, make_batch("unet", seed=step))
        gradient = gradients(trainer.network, lambda network, a=arrays: trainer.loss(network, a))
        norm = np.sqrt(sum(np.sum(array.astype(np.float64) ** 2) for array in gradient.values()))
        result = run(trainer, "unet", 1)[0]
        assert result.gradient_norm == pytest.approx(norm, rel=1e-5)
        for name, weight in weights.items():
            g = gradient[name] * min(1.0, SMOOTH.gradient_clip / norm)
            first[name] = b1 * first[name] + (1 - b1) * g
            second[name] = b2 * second[name] + (1 - b2) * g**2
            step_size = first[name] / (1 - b1 ** (step + 1)) / (np.sqrt(second[name] / (1 - b2 ** (step + 1))) + eps)
            weights[name] = weight - LEARNING_RATES[step] * (SMOOTH.weight_decay * weight + step_size)
    start = joined(make_weights("unet"))
    expected = np.concatenate([weights[name].ravel() for name in sorted(weights)])
    assert_close(joined(trainer.weights()) - start, expected - start, rms=UPDATE_RMS)


# Devices


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_trainer_on_a_device_that_is_not_there_is_refused(backend: Backend) -> None:
    with pytest.raises(BackendError, match="device"):
        MODULES[backend].unet_trainer(UNET, SMOOTH, make_weights("unet"), device="tpu")


def test_making_a_torch_trainer_leaves_the_global_random_state() -> None:
    before = torch.get_rng_state()
    make_trainer("torch", "unet")
    assert torch.equal(torch.get_rng_state(), before)


# The group normalisation of CPU training


@pytest.mark.parametrize("mean", [0.0, 300.0])
@pytest.mark.parametrize("shape", [(2, 8, 5, 3), (1, 24, 1, 1), (3, 16, 8, 8)])
def test_lean_group_normalisation_is_that_of_torch(shape: tuple[int, ...], mean: float) -> None:
    x = torch.from_numpy(normal(*shape, seed=0) * 2 + mean).contiguous(memory_format=torch.channels_last)
    weight, bias = (torch.from_numpy(normal(shape[1], seed=seed)) for seed in (1, 2))
    upstream = torch.from_numpy(normal(*shape, seed=3))

    def outcome(function: Any, dtype: torch.dtype) -> list[Any]:
        inputs = [tensor.to(dtype).clone().requires_grad_() for tensor in (x, weight, bias)]
        out = function(*inputs)
        out.backward(upstream.to(dtype))
        return [out.detach(), *(tensor.grad for tensor in inputs)]

    lean = outcome(lambda x, w, b: mvtorch.train._LeanGroupNorm.apply(x, w, b, 4, 1e-5), torch.float32)
    exact = outcome(lambda x, w, b: F.group_norm(x, 4, w, b, 1e-5), torch.float64)
    tolerance = 1e-5 + 3e-6 * mean  # products with the mean are rounded
    for actual, expected in zip(lean, exact, strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=tolerance)


def test_trainers_on_the_cpu_use_the_lean_group_normalisation() -> None:
    norm = make_trainer("torch", "unet").network.conv_norm_out
    x = torch.randn(1, 16, 4, 4, requires_grad=True)
    assert "_LeanGroupNorm" in type(norm(x).grad_fn).__name__


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_weights_stay_and_the_others_learn(backend: Backend) -> None:
    trainer = make_trainer(backend, "vae", frozen=("encoder.", "quant_conv."))
    before = trainer.weights()
    run(trainer, "vae", 2)
    state = trainer.state()
    for name, array in trainer.weights().items():
        same = np.array_equal(array, before[name])
        assert same == name.startswith(("encoder.", "quant_conv.")), name
        assert np.array_equal(state[f"ema.{name}"], before[name]) == same, name
    trainer.load_state(state)
    run(trainer, "vae", 1)
    assert np.array_equal(trainer.weights()["encoder.conv_in.weight"], before["encoder.conv_in.weight"])


def loss_of_decoding(backend: Backend, batch: Any, pixels: NDArray[np.float32], config: VAELossConfig) -> float:
    """The loss of a VAE that decodes `pixels`, whatever the batch (a VAEBatch of the backend's arrays) is."""
    moments, decoded = Moments(batch.noise, batch.noise), on_backend(backend, VAEBatch(pixels, pixels, pixels)).pixels
    vae = SimpleNamespace(config=VAE, encode=lambda pixels: moments, decode=lambda latents: decoded)
    return MODULES[backend].vae_loss(vae, batch, config).item()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_the_vae_gets_wrong_counts_more_at_the_border_and_most_in_a_corner(backend: Backend) -> None:
    """With weights of 1, 1 + 3 and 1 + 6, whose mean over 8 x 8 pixels is 1 + 3 * 4 * 8 / 64."""
    config = VAELossConfig(mse_weight=0, gradient_weight=0, coarse_weight=0, kl_weight=0, foreground_weight=0, border_weight=3)
    zeros = np.zeros((1, 8, 8, 3), np.float32)
    batch = on_backend(backend, VAEBatch(zeros, zeros[..., 0], np.zeros((1, 4, 4, 4), np.float32)))

    def loss(row: int, column: int) -> float:
        wrong = zeros.copy()
        wrong[0, row, column] = 1
        return loss_of_decoding(backend, batch, wrong, config)

    assert loss(3, 4) == pytest.approx(1 / 64 / 2.5)
    assert loss(0, 4) == loss(3, 7) == pytest.approx(4 / 64 / 2.5)
    assert loss(0, 0) == loss(7, 0) == loss(7, 7) == pytest.approx(7 / 64 / 2.5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_the_vae_gets_wrong_counts_more_where_there_is_detail(backend: Backend) -> None:
    """With weights of 1 and, at two of 8 x 8 pixels, of 1 + 6 / 2 and 1 + 6, whose mean is 1 + 9 / 64."""
    config = VAELossConfig(mse_weight=0, gradient_weight=0, coarse_weight=0, kl_weight=0, foreground_weight=0, detail_weight=6)
    zeros = np.zeros((1, 8, 8, 3), np.float32)
    detail = zeros[..., 0].copy()
    detail[0, 2, 3], detail[0, 5, 1] = 0.5, 1
    batch = on_backend(backend, VAEBatch(zeros, zeros[..., 0], np.zeros((1, 4, 4, 4), np.float32), detail))

    def loss(row: int, column: int) -> float:
        wrong = zeros.copy()
        wrong[0, row, column] = 1
        return loss_of_decoding(backend, batch, wrong, config)

    assert loss(3, 2) == pytest.approx(1 / 64 / (1 + 9 / 64))
    assert loss(2, 3) == pytest.approx(4 / 64 / (1 + 9 / 64))
    assert loss(5, 1) == pytest.approx(7 / 64 / (1 + 9 / 64))


class Outputs:
    """A U-Net with this output, whatever it is given."""

    def __init__(self, out: Any) -> None:
        self.config, self.out = UNET, out

    def constants(self, *_: Any, **__: Any) -> None:
        return None

    def time_embeddings(self, timesteps: Any) -> Any:
        return timesteps

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self.out


def loss_of_output(
    backend: Backend,
    out: NDArray[np.float32],
    target: NDArray[np.float32],
    config: UNetLossConfig,
    *,
    taught: NDArray[np.float32] | None = None,
    **fields: Any,
) -> float:
    """The loss of a U-Net with the output `out`, its teacher's is `taught`; `fields` are further ones of the batch."""
    batch = make_batch("unet")._replace(target=target, **fields)
    outputs, teacher = (
        None if each is None else Outputs(on_backend(backend, batch._replace(sample=each)).sample) for each in (out, taught)
    )
    loss: float = MODULES[backend].unet_loss(outputs, on_backend(backend, batch), config, teacher=teacher).item()
    return loss


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_the_unet_gets_wrong_counts_more_where_there_is_detail(backend: Backend) -> None:
    out, target = normal(2, 3, 4, 6, 4, seed=0), normal(2, 3, 4, 6, 4, seed=1)
    detail = np.random.default_rng(2).random((2, 3, 4, 6), np.float32) ** 4
    loss = loss_of_output(backend, out, target, UNetLossConfig(detail_weight=6.0), detail=detail)
    weight = (1 + 6 * detail.astype(np.float64))[..., None]
    square = (out.astype(np.float64) - target) ** 2
    expected = (weight * square).sum() / (4 * weight.sum())  # four channels of each weight
    assert loss == pytest.approx(expected, rel=1e-6)
    assert loss != pytest.approx(square.mean(), rel=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_where_there_is_no_detail_the_target_is_the_teachers_output(backend: Backend) -> None:
    out, target, taught = (normal(2, 3, 4, 6, 4, seed=seed) for seed in range(3))
    detail = np.maximum(np.random.default_rng(3).random((2, 3, 4, 6), np.float32) - 0.5, 0)
    config = UNetLossConfig(detail_weight=6.0, distill_rest=True)
    loss = loss_of_output(backend, out, target, config, taught=taught, detail=detail)
    weight, wanted = (1 + 6 * detail.astype(np.float64))[..., None], np.where(detail[..., None] > 0, target, taught)
    square = (out.astype(np.float64) - wanted) ** 2
    assert loss == pytest.approx((weight * square).sum() / (4 * weight.sum()), rel=1e-6)
    assert loss != pytest.approx(loss_of_output(backend, out, target, config, detail=detail), rel=1e-2)


def distilled(backend: Backend, *, detail: NDArray[np.float32], dtype: str = "float32") -> tuple[Any, Any]:
    """A trainer that keeps what it can do where there is no detail, and a batch."""
    loss = UNetLossConfig(detail_weight=3.0, distill_rest=True)
    trainer = MODULES[backend].unet_trainer(GAF, SMOOTH, make_weights("gaf"), loss=loss, dtype=dtype, device="cpu")
    return trainer, make_batch("gaf")._replace(detail=detail)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_distilled_is_the_network_that_training_starts_from(backend: Backend) -> None:
    trainer, batch = distilled(backend, detail=np.zeros((2, 2, 4, 6), np.float32))
    first = trainer.step(batch, learning_rate=0.0)  # its own outputs are right
    assert first.loss < 1e-12
    trainer.load_state(make_trainer(backend, "gaf", weights=initial_weights(mvtorch.model.network_shapes(GAF), seed=7)).state())
    before = joined(trainer.weights())
    losses = [trainer.step(batch, learning_rate=1e-2).loss for _ in range(4)]
    assert losses[0] > 1e-3, "the teacher went with the loaded state"
    assert losses[-1] < losses[0]
    assert_different(joined(trainer.weights()), before, rms=1e-3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_teacher_computes_in_the_dtype_of_training(backend: Backend, dtype: str) -> None:
    trainer, batch = distilled(backend, detail=np.zeros((2, 2, 4, 6), np.float32), dtype=dtype)
    own = trainer.step(batch, learning_rate=0.0).loss
    assert own < 1e-4
    if backend == "mlx":  # torch's autocast computes with any teacher in its own dtype
        exact, _ = distilled(backend, detail=batch.detail)
        trainer.loss.keywords["teacher"] = exact.loss.keywords["teacher"]
        assert own < trainer.step(batch, learning_rate=0.0).loss / 2


def test_distillation_is_the_same_on_both_backends() -> None:
    detail = np.maximum(np.random.default_rng(0).random((2, 2, 4, 6), np.float32) - 0.5, 0)
    results = {}
    for backend in BACKENDS:
        trainer, batch = distilled(backend, detail=detail)
        results[backend] = [trainer.step(batch, learning_rate=1e-2) for _ in range(3)]
    np.testing.assert_allclose(np.array(results["mlx"]), np.array(results["torch"]), rtol=LOSS_RTOL)
