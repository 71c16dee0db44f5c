"""How many primitives a step of the U-Net takes in MLX."""

import mlx.core as mx
import pytest

from benchmarks.operations import Call, as_on_metal, computing, ours, primitives

# Of mlx-examples' U-Net at commit 7ddca42, by `python -m benchmarks.operations --against`: all, and those that compute.
MLX_EXAMPLES = {"CPU": (4388, 1909), "Metal": (2619, 845)}


@pytest.fixture(scope="module")
def step() -> Call:
    return ours((64, 128, 128, 128), size=8)[0]


def test_a_step_takes_fewer_primitives_than_in_mlx_examples(step: Call) -> None:
    plain = primitives(step())
    with as_on_metal():
        metal = primitives(step())
    for name, counts in (("CPU", plain), ("Metal", metal)):
        every, some = MLX_EXAMPLES[name]
        assert counts.total() < 0.8 * every
        assert computing(counts) < 0.85 * some
    assert primitives(step()) == plain  # as it was before


def test_what_only_changes_how_an_array_is_read_does_not_count() -> None:
    x = mx.ones((2, 3, 4))
    mx.eval(x)
    counts = primitives(x.reshape(6, 4).T + 1)
    assert counts == {"Reshape": 1, "Transpose": 1, "Broadcast": 1, "Add": 1}
    assert computing(counts) == 1
