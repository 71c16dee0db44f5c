"""Initial weights drawn in numpy, so that one seed starts the same training in both backends.

Linear and convolution weights are uniform in +-1/sqrt(fan_in), biases zero, norms one. The last layer of every residual
branch of a U-Net starts at zero, as in guided diffusion (arXiv 2105.05233, zero_module).
"""

import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

LOGVAR = -6.0  # a VAE starts with a posterior so narrow that its noise does not drown the first latents
UNET_ZEROS = (".conv2.weight", ".proj_out.weight", "conv_out.weight")
UPSCALER_ZEROS = (".conv2.weight", ".to_out.0.weight", "conv_out.weight", ".linear.weight")


def initial_weights(
    shapes: Mapping[str, tuple[int, ...]], *, seed: int, zeros: Sequence[str] = ()
) -> dict[str, NDArray[np.float32]]:
    """Weights by name for `shapes` (checkpoint layout, output channels first); names ending in one of `zeros` are zero."""
    weights = {}
    for name, shape in shapes.items():
        if name.endswith((*zeros, ".bias")):
            weights[name] = np.zeros(shape, np.float32)
        elif len(shape) == 1:
            weights[name] = np.ones(shape, np.float32)
        else:
            generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
            bound = float(np.prod(shape[1:])) ** -0.5
            weights[name] = generator.uniform(-bound, bound, shape).astype(np.float32)
    return weights


def initial_vae_weights(shapes: Mapping[str, tuple[int, ...]], *, seed: int) -> dict[str, NDArray[np.float32]]:
    """`initial_weights` of a VAE, with a narrow posterior, and with half of the first filters blind to grey.

    Colour is a small part of the pictures' variance: those filters give it the weight that brightness has.
    """
    weights = initial_weights(shapes, seed=seed)
    bias = weights["quant_conv.bias"]
    bias[len(bias) // 2 :] = LOGVAR
    filters = weights["encoder.conv_in.weight"]
    colored = filters[len(filters) // 2 :]
    colored -= colored.mean(axis=1, keepdims=True)
    colored *= 3
    return weights


def initial_upscaler_weights(shapes: Mapping[str, tuple[int, ...]], *, seed: int) -> dict[str, NDArray[np.float32]]:
    """`initial_weights` of an upscaler, with adaptive norms that begin as plain ones, and random frequencies of its time."""
    weights = initial_weights(shapes, seed=seed, zeros=UPSCALER_ZEROS)
    name = "time_proj.weight"
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return weights | {name: generator.standard_normal(shapes[name]).astype(np.float32)}
