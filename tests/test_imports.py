"""Who may import whom, and that importing does nothing else."""

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"mvshared": ROOT / "shared" / "mvshared", "mvmlx": ROOT / "mvmlx", "mvtorch": ROOT / "mvtorch"}

# Import names by distribution, where they differ.
IMPORT_NAMES = {"pillow": "PIL"}
OPTIONAL = {"embreex", "mapbox_earcut", "matplotlib", "numba", "trimesh"}
BROUGHT_ALONG = {"triton"}  # by PyTorch for CUDA; the plain layers run without
NEEDED_BY_OTHERS = {"scipy"}  # by trimesh, which does not ask for it
SHARED_MAY_IMPORT = {"PIL", "click", "huggingface_hub", "numpy", "safetensors", "tokenizers", "tqdm"} | OPTIONAL
MAY_IMPORT = {
    "mvshared": SHARED_MAY_IMPORT | {"mvshared"},
    "mvmlx": SHARED_MAY_IMPORT | {"mvshared", "mvmlx", "mlx"},
    "mvtorch": SHARED_MAY_IMPORT | {"mvshared", "mvtorch", "torch"} | BROUGHT_ALONG,
}
# Modules inside of allowed packages that pull in an array library.
BRING_AN_ARRAY_LIBRARY = re.compile(r"safetensors\.(?!numpy\b)\w+")
HEAVY = (
    "torch",
    "mlx",
    "jax",
    "tensorflow",
    "scipy",
    "matplotlib",
    "numba",
    "huggingface_hub",
    "diffusers",
    "transformers",
    "trimesh",
    "embreex",
    "mapbox_earcut",
)

# Modules of mvshared.heads that numba compiles, or that import such; render() imports them when it is called.
USE_NUMBA = ("fields", "grid", "jit", "layers", "loops", "paint", "primitives", "shape", "trace")

# Imports each module with the project's own packages forgotten, so that a circular import shows whichever comes first.
PROBE = """
import contextlib, importlib, io, json, sys
names, own, heavy = json.loads(sys.argv[1])
report = {}
for name in names:
    for module in [m for m in sys.modules if m.partition(".")[0] in own]:
        del sys.modules[module]
    before = set(sys.modules)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        importlib.import_module(name)
    pulled = sorted({m.partition(".")[0] for m in set(sys.modules) - before} & set(heavy))
    report[name] = {"said": said.getvalue(), "pulled": pulled}
print(json.dumps(report))
"""


def sources(package: str) -> list[Path]:
    return sorted(PACKAGES[package].rglob("*.py"))


def module_name(package: str, path: Path) -> str:
    parts = path.relative_to(PACKAGES[package].parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def every_source() -> list[Path]:
    folders = [*PACKAGES.values(), ROOT / "tests", ROOT / "benchmarks"]
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import statement, and of every constant given to `importlib.import_module`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from ((node.lineno, a.value) for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))


def offences(package: str, source: str) -> list[str]:
    """`line: name` of what a module of `package` with this source may not import."""
    found = []
    for line, name in imports(ast.parse(source)):
        top = name.partition(".")[0]
        allowed = top in MAY_IMPORT[package] or top in sys.stdlib_module_names
        if not allowed or (package == "mvshared" and BRING_AN_ARRAY_LIBRARY.match(name)):
            found.append(f"{line}: {name}")
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_they_may(package: str) -> None:
    assert sources(package), f"{package} has no modules"
    found = {path.name: bad for path in sources(package) if (bad := offences(package, path.read_text()))}
    allowed = ", ".join(sorted(MAY_IMPORT[package]))
    assert not found, f"{package} may import the standard library and {allowed}, but imports {found}"


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("mvshared", "import torch"),
        ("mvshared", "def f():\n    from mlx import core"),
        ("mvshared", "import mvtorch.unet"),
        ("mvshared", "from safetensors.torch import load_file"),
        ("mvshared", "from safetensors import torch"),
        ("mvmlx", "from mvtorch import layers"),
        ("mvmlx", "importlib.import_module('mvtorch')"),
        ("mvtorch", "import mlx.core as mx"),
        ("mvtorch", "from diffusers import UNet2DConditionModel"),
        ("mvtorch", "import torchvision"),
        ("mvtorch", "from . import layers"),
        ("mvmlx", "from transformers import CLIPTokenizer"),
    ],
)
def test_the_rules_catch_a_forbidden_import(package: str, source: str) -> None:
    assert offences(package, source)


def test_everything_that_may_be_imported_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [
        *project["dependencies"],
        *(r for extra in ("torch", "train", "mesh") for r in project["optional-dependencies"][extra]),
    ]
    distributions = {re.split(r"[\[<>=;! ]", requirement)[0] for requirement in requirements}
    declared = {IMPORT_NAMES.get(name, name) for name in distributions}
    assert set().union(*MAY_IMPORT.values()) - set(PACKAGES) - BROUGHT_ALONG == declared - NEEDED_BY_OTHERS


def test_nothing_imports_the_folder_shared() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in every_source()
        for line, name in imports(ast.parse(path.read_text()))
        if name.partition(".")[0] == "shared"
    ]
    assert not found, f"import mvshared, not shared: {found}"


def test_there_is_no_file_for_leftovers() -> None:
    leftovers = {"utils", "util", "helper", "misc", "common"}
    assert not [path for path in every_source() if path.stem in leftovers]


def needs_what_is_missing(path: Path) -> bool:
    """Whether it imports what other packages bring along, on a platform that has no such package (Triton on macOS)."""
    missing = {name for name in BROUGHT_ALONG if importlib.util.find_spec(name) is None}
    return any(name.partition(".")[0] in missing for _, name in imports(ast.parse(path.read_text())))


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_imports_alone_without_side_effects(package: str, tmp_path: Path) -> None:
    """One fresh interpreter in an empty home and folder: no file made, nothing printed, no warning, no heavy library."""
    backend = {"mvmlx": "mlx.core", "mvtorch": "torch"}.get(package)
    if backend is not None:
        pytest.importorskip(backend)
    names = [module_name(package, path) for path in sources(package) if not needs_what_is_missing(path)]
    allowed = {"mvmlx": {"mlx"}, "mvtorch": {"torch"}}.get(package, set())
    compiled = {f"mvshared.heads.{name}" for name in USE_NUMBA}
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "TMPDIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "shared"))),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    arguments = json.dumps([names, list(PACKAGES), HEAVY])
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROBE, arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    report = json.loads(result.stdout)
    assert list(report) == names
    assert {name: entry["said"] for name, entry in report.items() if entry["said"]} == {}
    # numba loads SciPy.
    may = {name: allowed | {"numba", "scipy"} if name in compiled else allowed for name in names}
    pulled = {name: bad for name, entry in report.items() if (bad := set(entry["pulled"]) - may[name])}
    assert not pulled, f"importing these pulls in heavy libraries: {pulled}"
    assert not list(tmp_path.rglob("*")), "importing made files"


@pytest.mark.parametrize("package", ["mvtorch", "mvmlx"])
def test_the_types_of_what_is_returned_are_at_the_top_and_imported_when_asked_for(package: str) -> None:
    module = importlib.import_module(package)
    assert {getattr(module, name).__module__ for name in ("Pipeline", "Progress", "Upscaler", "Views")} == {
        "mvshared.pipeline",
        "mvshared.upscaling.latents",
        "mvshared.runs",
    }
    assert module.__version__ == importlib.metadata.version("mvmlx")
    assert all(hasattr(module, name) for name in module.__all__)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'Nothing'"):
        module.Nothing  # noqa: B018
    with pytest.raises(ImportError):
        exec(f"from {package} import nothing", {})
