"""Which backend and which dtype are the default, the reasons that are given, and where they are printed."""

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import safetensors.numpy
from helpers import BACKENDS, TINY_VAE, Backend, assert_close, make_upscaler, make_vae
from upscalers import TINY as TINY_UPSCALER

import mvmlx.model
import mvshared.backend
import mvshared.precision
import mvtorch.model
from mvshared.backend import Dtype, choose_backend
from mvshared.checkpoint import weight_files, write_component
from mvshared.cli import run
from mvshared.inspection import inspect_devices
from mvshared.precision import KEPT_FLOAT32, METAL, MLX_CPU, SLOW_AVX512, elsewhere, on_cpu, on_cuda

MODELS: dict[Backend, Any] = {"torch": mvtorch.model, "mlx": mvmlx.model}
READ_CPUINFO: Any = mvshared.precision.bfloat16_instructions  # the fixture of conftest replaces it
X86 = "processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: a processor\nflags\t\t: fpu sse2 {flags}\n\nprocessor\t: 1\n"
INTEL, AMD = "GenuineIntel", "AuthenticAMD"
ARM = "processor\t: 0\nFeatures\t: fp asimd {flags} svebf16x\n"


@pytest.mark.parametrize(
    ("system", "machine", "installed", "chosen"),
    [
        ("Darwin", "arm64", {"mlx", "torch"}, "mlx"),
        ("Darwin", "x86_64", {"mlx", "torch"}, "torch"),
        ("Linux", "arm64", {"mlx", "torch"}, "torch"),
        ("Linux", "x86_64", {"mlx", "torch"}, "torch"),
        ("Linux", "x86_64", {"mlx"}, "mlx"),
        ("Darwin", "arm64", {"torch"}, "torch"),
    ],
)
def test_the_backend_is_mlx_on_a_mac_with_apple_silicon_elsewhere_pytorch_else_what_is_there(
    monkeypatch: pytest.MonkeyPatch, system: str, machine: str, installed: set[str], chosen: str
) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(mvshared.backend, "find_spec", lambda name: name if name in installed else None)
    assert choose_backend() == chosen


@pytest.mark.parametrize(
    ("text", "instructions"),
    [
        (X86.format(vendor=INTEL, flags="avx512_bf16 avx512_fp16 amx_bf16"), "AMX"),
        (X86.format(vendor=INTEL, flags="avx512_bf16"), "AVX-512"),
        (X86.format(vendor=INTEL, flags="avx512_bf16 avx512_fp16"), SLOW_AVX512),
        (X86.format(vendor=AMD, flags="avx512_bf16 avx512_fp16"), "AVX-512"),
        (X86.format(vendor=INTEL, flags="avx512f avx512_fp16"), None),
        (ARM.format(flags="bf16 i8mm"), "Arm's BF16"),
        (ARM.format(flags="i8mm"), None),
        ("bugs : bf16\n", None),
        ("", None),
    ],
)
def test_instructions_for_bfloat16_are_read_from_the_kernels_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, instructions: str | None
) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(mvshared.precision, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(mvshared.precision.platform, "system", lambda: "Linux")
    assert READ_CPUINFO.__wrapped__() == instructions


def test_without_the_kernels_list_no_instructions_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mvshared.precision, "CPUINFO", tmp_path / "none")
    assert READ_CPUINFO.__wrapped__() is None
    (tmp_path / "none").write_text(X86.format(vendor=INTEL, flags="amx_bf16"))
    monkeypatch.setattr(mvshared.precision.platform, "system", lambda: "Darwin")
    assert READ_CPUINFO.__wrapped__() is None


def test_every_choice_names_a_dtype_and_one_sentence_of_reason() -> None:
    choices = [
        METAL,
        MLX_CPU,
        on_cuda((9, 0)),
        on_cuda((6, 1)),
        on_cpu("AMX"),
        on_cpu(SLOW_AVX512),
        on_cpu(None),
        elsewhere("mps"),
    ]
    for choice in choices:
        assert choice.dtype in get_args(Dtype)
        assert choice.reason and not choice.reason.endswith(".")
    assert "6.1" in on_cuda((6, 1)).reason
    assert "AMX" in on_cpu("AMX").reason
    assert "mps" in elsewhere("mps").reason


@pytest.mark.parametrize(("capability", "dtype"), [((6, 1), "float32"), ((7, 0), "float16"), ((7, 5), "float16")])
def test_a_gpu_with_tensor_cores_computes_in_float16(capability: tuple[int, int], dtype: str) -> None:
    assert on_cuda(capability).dtype == dtype


def test_a_processor_never_computes_in_float16_by_default() -> None:
    assert on_cpu("AMX").dtype == on_cpu("AVX-512").dtype == "bfloat16"
    assert on_cpu(SLOW_AVX512).dtype == on_cpu(None).dtype == MLX_CPU.dtype == "float32"


def test_info_names_device_dtype_and_reason_of_every_backend(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mvshared.precision, "bfloat16_instructions", lambda: "AMX")
    expected = inspect_devices()
    assert {each.backend for each in expected} == set(BACKENDS)
    assert {each.dtype for each in expected if each.device == "cpu" and each.backend == "torch"} <= {"bfloat16"}
    for arguments in (["info"], ["info", "demo"]):
        assert run(arguments) == 0
        lines = capfd.readouterr().out.splitlines()
        for each in expected:
            said = [line for line in lines if line.startswith(f"{each.backend} computes on {each.device} in {each.dtype}")]
            assert len(said) == 1 and said[0].endswith(each.reason)
        assert ("family" in lines[0]) == (arguments[1:] == ["demo"])


def test_info_of_one_backend_is_of_that_alone_and_json_has_the_same(capfd: pytest.CaptureFixture[str]) -> None:
    for backend in BACKENDS:
        assert run(["info", "--backend", backend, "--json"]) == 0
        document = json.loads(capfd.readouterr().out)
        assert document == {"devices": [vars(each) for each in inspect_devices(backend=backend)]}
        assert document["devices"][0]["backend"] == backend


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_convolution_and_the_frequencies_of_time_keep_float32_weights(backend: Backend, tmp_path: Path) -> None:
    vae, upscaler = make_vae(TINY_VAE, "torch"), make_upscaler(TINY_UPSCALER, "torch")
    write_component(tmp_path, "vae", TINY_VAE, mvtorch.model.get_weights(vae))
    safetensors.numpy.save_file(mvtorch.model.get_weights(upscaler), tmp_path / "unet.safetensors")
    module = MODELS[backend]
    for config, files in ((TINY_VAE, weight_files(tmp_path, "vae")), (TINY_UPSCALER, [tmp_path / "unet.safetensors"])):
        tensors = module.read_tensors(files, module.network_shapes(config), dtype="bfloat16", device="cpu")
        kept = {name for name, tensor in tensors.items() if str(tensor.dtype).endswith("float32")}
        assert kept and kept == tensors.keys() & set(KEPT_FLOAT32)
        for name in kept:
            stored = (vae if config is TINY_VAE else upscaler).state_dict()[name]
            kernel = tensors[name].ndim == 4 and backend == "mlx"
            assert_close(tensors[name].transpose(0, 3, 1, 2) if kernel else tensors[name], stored, rms=1e-9)


def test_a_process_of_its_own_uses_what_this_processor_has() -> None:
    code = "import mvtorch.model as m; print(*m.default_dtype('cpu'), sep='|')"
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env={"PYTHONPATH": f"{root}:{root / 'shared'}"}, text=True, capture_output=True
    )
    dtype, reason = done.stdout.strip().split("|")
    assert (dtype, reason) == on_cpu(READ_CPUINFO.__wrapped__())
