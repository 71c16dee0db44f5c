"""Both backends have the same files, classes, functions and signatures; only the names of array types may differ."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What only PyTorch can do: run diffusers, read its own pickles. What only PyTorch needs: CUDA graphs, as MLX hands whole graphs
# to the device by itself, settings of CUDA that belong to the program around this, products of weights that lie in one piece,
# and on a CPU weights that are laid out once and kernels in the place of its slow ones.
ONLY_TORCH = {"diffusers_model.py", "diffusers_inputs.py", "diffusers_upscaler.py", "pickled.py", "graphs.py", "inference.py"}
ONLY_TORCH |= {
    "onednn.py",
    "packed.py",
    "packed_convolutions.py",
    "widened.py",
    "winograd.py",
    "cpu_attention.py",
    "cpu_norms.py",
}
ONLY_TORCH |= {"cuda_fused.py", "cuda_kernels.py", "joined.py"}
# Compilation, and what is for a Mac's GPU; where and when MLX computes, its layout of weights, and layers that it is slow or
# inexact at.
ONLY_MLX = {"compiled.py", "group_norm.py", "metal.py", "device.py", "layout.py", "norms.py", "convolutions.py"}

# PyTorch's word, MLX's word, and the one that stands for both.
WORDS = (
    (r"\btorch\.Tensor\b|\bTensor\b", r"\bmx\.array\b", "Array"),
    (r"\btorch\.dtype\b", r"\bmx\.Dtype\b", "Dtype"),
    (r"\bmvtorch\b", r"\bmvmlx\b", "backend"),
)


def files(package: str) -> set[str]:
    return {path.relative_to(ROOT / package).as_posix() for path in (ROOT / package).rglob("*.py")}


def unified(text: str) -> str:
    for torch_word, mlx_word, both in WORDS:
        text = re.sub(f"{torch_word}|{mlx_word}", both, text)
    return text


def signature(function: ast.FunctionDef) -> str:
    returns = "" if function.returns is None else f" -> {ast.unparse(function.returns)}"
    decorators = "".join(f"@{ast.unparse(decorator)} " for decorator in function.decorator_list)
    return unified(f"{decorators}({ast.unparse(function.args)}){returns}")


def is_public(name: str) -> bool:
    return not name.startswith("_") or name in ("__init__", "forward")


def interface(source: str) -> dict[str, str]:
    """Signatures of public functions and methods, fields of classes, and constants, by dotted name; `__call__` is `forward`."""
    found: dict[str, str] = {}

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef):
                name = "forward" if node.name == "__call__" else node.name
                if is_public(name):
                    found[prefix + name] = signature(node)
            elif isinstance(node, ast.ClassDef) and is_public(node.name):
                found[prefix + node.name] = "class"
                visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.AnnAssign) and is_public(ast.unparse(node.target)):
                found[prefix + ast.unparse(node.target)] = unified(ast.unparse(node))
            elif isinstance(node, ast.Assign):
                for name in map(ast.unparse, node.targets):
                    if is_public(name):
                        found[prefix + name] = unified(ast.unparse(node.value))

    visit(ast.parse(source).body, "")
    return found


def assert_mirrored(torch_source: str, mlx_source: str, *, file: str) -> None:
    ours, theirs = interface(mlx_source), interface(torch_source)
    lines = [
        f"  {name}: mvtorch has {theirs.get(name, 'nothing')}, mvmlx has {ours.get(name, 'nothing')}"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    if lines:
        raise AssertionError("\n".join([f"{file} differs:", *lines]))


def test_both_backends_have_the_same_files() -> None:
    assert files("mvtorch") - ONLY_TORCH == files("mvmlx") - ONLY_MLX
    assert {"layers.py", "attention.py", "unet.py", "vae.py"} <= files("mvtorch")


@pytest.mark.parametrize("file", sorted(files("mvtorch") & files("mvmlx")))
def test_twins_have_the_same_interface(file: str) -> None:
    assert_mirrored((ROOT / "mvtorch" / file).read_text(), (ROOT / "mvmlx" / file).read_text(), file=file)


TORCH = """
SIZE = 3
class Block(nn.Module):
    width: int
    def __init__(self, channels: int, *, eps: float = 1e-5) -> None: ...
    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor: ...
    def _private(self, x: Tensor) -> Tensor: ...
def function(x: torch.Tensor, dtype: torch.dtype) -> list[Tensor]: ...
"""
MLX = """
SIZE = 3
class Block(nn.Module):
    width: int
    def __init__(self, channels: int, *, eps: float = 1e-5) -> None: ...
    def __call__(self, x: mx.array, *, scale: float = 1.0) -> mx.array: ...
def function(x: mx.array, dtype: mx.Dtype) -> list[mx.array]: ...
"""


def test_array_types_and_private_functions_may_differ() -> None:
    assert_mirrored(TORCH, MLX, file="example.py")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("class Block", "class Brick"),
        ("def function", "def other"),
        ("x: mx.array, dtype", "y: mx.array, dtype"),
        ("x: mx.array, dtype: mx.Dtype", "dtype: mx.Dtype, x: mx.array"),
        ("*, scale", "scale"),
        ("scale: float = 1.0", "scale: float"),
        ("eps: float = 1e-5", "eps: float = 1e-6"),
        ("channels: int", "channels: float"),
        ("list[mx.array]", "mx.array"),
        ("width: int", "width: float"),
        ("SIZE = 3", "SIZE = 4"),
    ],
)
def test_every_other_difference_is_found(old: str, new: str) -> None:
    assert old in MLX
    with pytest.raises(AssertionError, match=r"example\.py differs"):
        assert_mirrored(TORCH, MLX.replace(old, new), file="example.py")
