"""Downloads from a stand-in of the hub: pinned, checked, resumed, offline first."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from hub import REPOSITORY, Hub, commit_of, serving

from mvshared import download as download_module
from mvshared import models
from mvshared.backend import load
from mvshared.checkpoint import find_model, model_name
from mvshared.cli import run
from mvshared.download import Plan, _wanted, download
from mvshared.errors import CheckpointError, ConfigError, DownloadError, OptionError
from mvshared.models import REPOSITORIES, Pin, pins_path, read_pins, repository_of

FIXTURES = Path(__file__).parent / "fixtures"
FIRST, SECOND = commit_of(1), commit_of(2)
UNET = "unet/diffusion_pytorch_model.safetensors"
BESIDE = {
    "README.md": b"# a card",
    "sd-v1-5.ckpt": b"pickle",
    "v1-5-pruned.safetensors": b"\x02\0\0\0\0\0\0\0{}",
    "unet/diffusion_pytorch_model.bin": b"pickle",
    "unet/diffusion_pytorch_model.fp16.safetensors": b"\x02\0\0\0\0\0\0\0{}",
    "safety_checker/config.json": b"{}",
    "mv_unet.py": b"import os",
}


def tiny(name: str = "tiny-mvdream") -> dict[str, bytes]:
    folder = FIXTURES / name
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix in (".json", ".txt", ".safetensors")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths if path.name != "golden.safetensors"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(Hub(revisions={FIRST: tiny() | BESIDE}, main=FIRST)) as served:
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setenv("MVMLX_HOME", str(tmp_path / "home"))
        yield served


def test_a_download_is_announced_pinned_and_loaded_by_name(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Plan] = []
    pin = download(REPOSITORY, on_plan=plans.append)
    (plan,) = plans
    files = tiny()
    assert (plan.revision, plan.licence, plan.cache) == (FIRST, "openrail++", tmp_path / "cache")
    assert plan.bytes == sum(map(len, files.values()))
    assert set(pin.files) == set(files)
    assert not [name for name in BESIDE if any(name in request for request in hub.requests)]
    for name, content in files.items():
        assert (Path(pin.folder) / name).read_bytes() == content
    assert read_pins() == {REPOSITORY: pin}
    monkeypatch.chdir(tmp_path)
    assert find_model(REPOSITORY) == Path(pin.folder)
    views = load(REPOSITORY, backend="torch", device="cpu").generate(prompt="an owl", steps=1, size_px=128)
    assert views.parameters.model == REPOSITORY == model_name(REPOSITORY)


def test_what_is_there_needs_no_network(hub: Hub) -> None:
    pin = download(REPOSITORY)
    hub.requests.clear()
    assert download(REPOSITORY) == pin
    assert download(REPOSITORY, revision=FIRST) == pin
    assert download(REPOSITORY, verify=True) == pin
    assert not hub.requests


def test_the_first_revision_is_kept_until_another_is_asked_for(hub: Hub) -> None:
    download(REPOSITORY)
    newer = tiny("tiny-imagedream")
    hub.revisions[SECOND], hub.main = newer, SECOND
    assert download(REPOSITORY).revision == FIRST
    (Path(read_pins()[REPOSITORY].folder) / "unet" / "config.json").unlink()
    hub.requests.clear()
    assert download(REPOSITORY).revision == FIRST
    assert f"GET /api/models/{REPOSITORY}/revision/{FIRST}" in {request.partition("?")[0] for request in hub.requests}
    assert download(REPOSITORY, revision="main").revision == SECOND
    assert set(read_pins()[REPOSITORY].files) == set(newer)
    assert download(REPOSITORY).revision == SECOND


def test_a_file_that_changes_under_its_revision_is_refused(hub: Hub) -> None:
    pin = download(REPOSITORY)
    pin.path(UNET).resolve().unlink()
    changed = bytearray(hub.revisions[FIRST][UNET])
    changed[-1] ^= 1
    hub.revisions[FIRST][UNET] = bytes(changed)
    with pytest.raises(DownloadError, match=rf"{UNET} is not the file that was first downloaded"):
        download(REPOSITORY)
    assert read_pins()[REPOSITORY] == pin


def test_a_file_that_changed_on_disk_is_found_and_fetched_again(hub: Hub) -> None:
    pin = download(REPOSITORY)
    path = pin.path(UNET).resolve()
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    assert download(REPOSITORY) == pin  # of its size
    with pytest.raises(DownloadError, match=r"has changed since it was downloaded \(it was removed; download again"):
        download(REPOSITORY, verify=True)
    assert download(REPOSITORY, verify=True) == pin
    assert pin.path(UNET).read_bytes() == tiny()[UNET]


def test_large_files_may_come_from_elsewhere(hub: Hub) -> None:
    hub.redirected = True
    pin = download(REPOSITORY)
    assert any("/elsewhere/" in request for request in hub.requests)
    assert pin.path(UNET).read_bytes() == tiny()[UNET]


def test_a_slow_answer_is_waited_for(hub: Hub) -> None:
    hub.slow = 0.002
    assert download(REPOSITORY).path(UNET).read_bytes() == tiny()[UNET]


def test_a_corrupt_file_is_fetched_again_and_never_kept(hub: Hub, tmp_path: Path) -> None:
    hub.corrupt = {UNET: 1, "tokenizer/vocab.json": 2}
    pin = download(REPOSITORY)
    assert pin.path(UNET).read_bytes() == tiny()[UNET]
    assert not any(hub.corrupt.values())


def test_a_file_that_stays_corrupt_is_an_error(hub: Hub, tmp_path: Path) -> None:
    hub.corrupt = {UNET: 99}
    with pytest.raises(DownloadError, match=f"{UNET} does not have the SHA-256 that the hub names"):
        download(REPOSITORY)
    assert not read_pins()
    left = (tmp_path / "cache").rglob("diffusion_pytorch_model.safetensors")
    assert not [path for path in left if path.parent.name == "unet" and path.exists()]
    hub.corrupt = {}
    download(REPOSITORY)


def test_a_truncated_answer_is_resumed(hub: Hub) -> None:
    hub.truncated = {UNET: 1}
    assert download(REPOSITORY).path(UNET).read_bytes() == tiny()[UNET]


def test_a_broken_download_goes_on_where_it_stopped(hub: Hub, tmp_path: Path) -> None:
    """A process that is killed in the middle leaves no pin, and its finished files are not fetched again."""
    hub.slow = 0.01
    code = f"from mvshared.download import download; download({REPOSITORY!r})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=tmp_path)
    while not any(f"GET /{REPOSITORY}/resolve/{FIRST}/{UNET}" in request for request in list(hub.requests)):
        assert process.poll() is None
    process.kill()
    process.wait()
    assert not read_pins()
    hub.slow = 0.0
    hub.requests.clear()
    pin = download(REPOSITORY)
    assert pin.path(UNET).read_bytes() == tiny()[UNET]
    assert not any(request.startswith(f"GET /{REPOSITORY}/resolve/{FIRST}/model_index.json") for request in hub.requests)


def test_a_server_in_trouble_is_asked_again(hub: Hub) -> None:
    hub.failing = 2
    assert download(REPOSITORY).revision == FIRST


def test_what_cannot_be_downloaded_is_said_in_one_line(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    cases = {
        ("owner/other",): "owner/other: is no repository of the hub, or a private one",
        (REPOSITORY, "--revision", commit_of(9)): "owner/tiny: has no such revision",
        ("owner/na me",): "owner/na me: is no name of a repository",
    }
    for arguments, message in cases.items():
        assert run(["download", *arguments]) == 11
        assert f"mvmlx: error: {message}" in capfd.readouterr().err
    assert run(["download", "flux"]) == 2
    assert "name must be one of mvdream, imagedream, sd15" in capfd.readouterr().err
    hub.revisions[FIRST] = {"model_index.json": b"{}", "unet/diffusion_pytorch_model.bin": b"pickle"}
    assert run(["download", REPOSITORY]) == 11
    assert "has no .safetensors weights in diffusers' layout (download the files yourself" in capfd.readouterr().err
    monkeypatch.setattr(download_module, "ATTEMPTS", 1)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert run(["download", REPOSITORY]) == 11
    assert "run it again: it goes on where it stopped" in capfd.readouterr().err


def test_the_command_tells_before_and_after(hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["models"]) == 0
    assert "mvdream: ashawkey/mvdream-sd2.1-diffusers, not downloaded (mvmlx download mvdream)" in capfd.readouterr().out
    assert run(["download", REPOSITORY]) == 0
    captured = capfd.readouterr()
    assert f"owner/tiny, revision {FIRST}, under the licence openrail++" in captured.err
    assert f"files of 4.9 MB go to {tmp_path / 'cache'}" in captured.err
    assert captured.out.startswith(f"owner/tiny is in {tmp_path / 'cache'}")
    assert run(["models"]) == 0
    assert f"owner/tiny: owner/tiny, revision {FIRST[:12]}, 4.9 MB, in {tmp_path}" in capfd.readouterr().out
    assert run(["models", "--json"]) == 0
    states = {entry["name"]: entry["state"] for entry in map(json.loads, capfd.readouterr().out.splitlines())}
    assert states == {"demo": "embedded", REPOSITORY: "downloaded"} | dict.fromkeys(REPOSITORIES, "not downloaded")
    assert run(["generate", "--model", "mvdream", "--prompt", "owl", "-o", str(tmp_path / "out")]) == 5
    assert "the model 'mvdream' is not downloaded (mvmlx download mvdream)" in capfd.readouterr().err


def test_a_licence_that_is_not_named_is_not_invented(hub: Hub, capfd: pytest.CaptureFixture[str]) -> None:
    hub.licence = None
    assert run(["download", REPOSITORY, "--json"]) == 0
    captured = capfd.readouterr()
    assert "under the licence that the repository does not name" in captured.err
    assert json.loads(captured.out)["licence"] is None


def test_no_revision_is_known_before_a_download() -> None:
    assert all(repository_of(name) == repository for name, repository in REPOSITORIES.items())
    assert [repository_of(name) for name in ("demo", "a/b", "/a/b", "./a", "~/a", "a/b/c", "a/")] == [
        None, "a/b", None, None, None, None, None,
    ]  # fmt: skip


def test_downloads_that_end_together_are_all_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MVMLX_HOME", str(tmp_path))
    names = ("owner/first", "owner/second")
    first, second = (Pin(repository=name, revision=FIRST, folder="cache", licence=None, files={}) for name in names)
    write, other = models.write_json, Thread(target=models.write_pin, args=(second,))

    def beside(path: Path, pins: dict[str, Any]) -> None:
        monkeypatch.setattr(models, "write_json", write)
        other.start()
        other.join(timeout=0.2)  # it waits until this one is done
        write(path, pins)

    monkeypatch.setattr(models, "write_json", beside)
    models.write_pin(first)
    other.join()
    assert read_pins() == {"owner/first": first, "owner/second": second}


def test_malformed_pins_are_one_error(hub: Hub) -> None:
    pins_path().parent.mkdir(parents=True)
    for content in ("[]", "{", '{"owner/tiny": {}}', '{"owner/tiny": 5}', '{"owner/tiny": {"revision": 1, "files": 3}}'):
        pins_path().write_text(content)
        with pytest.raises(ConfigError, match=r"models\.json"):
            download(REPOSITORY)


def test_names_that_are_none_say_which_there_are(hub: Hub) -> None:
    with pytest.raises(OptionError, match="or a repository such as owner/name, got 'sd3'"):
        download("sd3")
    with pytest.raises(CheckpointError, match="no such model: allowed are demo, mvdream, imagedream"):
        find_model("sd3")
    with pytest.raises(CheckpointError, match="no such model"):
        find_model("no/folder")


@pytest.mark.parametrize(
    ("files", "kept"),
    [
        (
            ["m.safetensors.index.fp16.json", "m.fp16-00001-of-00002.safetensors", "m.fp16-00002-of-00002.safetensors"],
            ["m.fp16-00001-of-00002.safetensors", "m.fp16-00002-of-00002.safetensors", "m.safetensors.index.fp16.json"],
        ),
        (
            ["m.safetensors.index.json", "m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors", "m.fp16.safetensors"],
            ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors", "m.safetensors.index.json"],
        ),
        (["m.safetensors", "m.fp16-00001-of-00002.safetensors", "m.safetensors.index.fp16.json"], ["m.safetensors"]),
        (["m.fp16.safetensors", "m.non_ema.safetensors", "m.bin"], ["m.fp16.safetensors"]),
    ],
)
def test_each_component_s_weights_are_fetched_once_and_whole(files: list[str], kept: list[str]) -> None:
    names = {"model_index.json": 1, "unet/config.json": 1} | {f"unet/{file}": 1 for file in files}
    assert _wanted(names) == ["model_index.json", *sorted(["unet/config.json", *(f"unet/{file}" for file in kept)])]
