"""The search for NaN and infinity: in what a run ends with, always, and if asked for in every block of every step."""

import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from mvshared.backend import Dtype
from mvshared.blocks import Block, Call
from mvshared.errors import NumericsError, OptionError
from mvshared.files import check_folder, make_folder, write_atomic
from mvshared.stages import Stages

T = TypeVar("T")


class Watched(Protocol[T]):
    """What is needed of a model: see `mvshared.backend.Model`."""

    dtype: Dtype

    def observe_blocks(
        self, on_end: Callable[[Block[T]], None], on_start: Callable[[Call[T]], None] | None = None
    ) -> AbstractContextManager[Callable[[], float]]: ...
    def all_finite(self, x: T) -> bool: ...
    def to_numpy(self, x: T) -> NDArray[np.float32]: ...


def check_views(values: NDArray[np.float32], what: str, *, where: str, dtype: Dtype) -> NDArray[np.float32]:
    """The same values (v, ...). Raises NumericsError that names the first view with NaN or infinity."""
    finite = np.isfinite(values)
    if finite.all():
        return values
    number = int(np.flatnonzero(~finite.reshape(len(values), -1).all(axis=1))[0])
    hint = f"{_cause(dtype)}; check_numerics=FOLDER finds the block where it begins"
    raise NumericsError(f"{what} of view {number} are not finite", where=where, view=f"view {number}", hint=hint)


def _cause(dtype: str) -> str:
    """What to look at first."""
    return "are the weights damaged?" if dtype == "float32" else 'use dtype="float32"'


@contextmanager
def checked_numerics(models: Mapping[str, Watched[Any]], stages: Stages, folder: Path | str | None) -> Iterator[None]:
    """Look at what every block gives that runs inside, of models by the prefix of their blocks' names; None looks at nothing.

    Raises NumericsError at the first output that is not finite, once the block's inputs are in `folder`, an .npz file beside a
    .json file that says what they are; and OutputError if that cannot be a folder.
    """
    if folder is None:
        yield
        return
    if not isinstance(folder, str | Path):
        raise OptionError("check_numerics", expected="a folder for what is found", got=folder)
    check_folder(folder)
    with ExitStack() as stack:
        for prefix, model in models.items():
            check = _Check(model, stages, Path(folder), prefix=prefix)
            stack.enter_context(model.observe_blocks(check.on_end, check.on_start))
        yield


class _Check(Generic[T]):
    """Looks at the blocks of a model."""

    def __init__(self, model: Watched[T], stages: Stages, folder: Path, *, prefix: str) -> None:
        self.model, self.stages, self.folder, self.prefix = model, stages, folder, prefix
        self.objects = self.views = self.frames = 0  # of the U-Net that runs; frames are views and references
        self.entry = -1  # of the stage that the counts are of
        self.counts: Counter[str] = Counter()  # pictures that each outermost block was given before
        self.first = 0  # the number of the first one that is given now

    def on_start(self, call: Call[T]) -> None:
        """Remember which views the outermost block is given."""
        if call.depth:
            return
        if self.entry != self.stages.entry:
            self.entry = self.stages.entry
            self.counts.clear()
        shapes = {name: _shape(array) for name, array in call.inputs.items()}
        self.objects, self.views = shapes["sample"][:2] if "sample" in shapes else (0, 0)
        self.frames = self.views
        pictures = next(iter(shapes.values()), (0,))[0]
        self.first = self.stages.first + self._before(call.name, pictures)
        self.counts[call.name] += pictures

    def _before(self, name: str, pictures: int) -> int:
        """Pictures before those that an outermost block is given. The VAE's layers may have tiles of one picture after the
        other; its outer convolutions, before the decoder and behind the encoder, have whole ones."""
        if name.startswith("vae.decoder"):
            return max(0, self.counts["vae.post_quant_conv"] - pictures)
        return self.counts["vae.quant_conv" if name.startswith("vae.encoder") else name]

    def on_end(self, block: Block[T]) -> None:
        """Raise NumericsError unless the block's outputs are finite."""
        for name, array in block.outputs.items():
            if self.objects and block.depth == 1 and name.endswith(".conv_in"):
                self.frames = _shape(array)[0] // self.objects
            if not self.model.all_finite(array):
                self._fail(block, name, array)

    def _fail(self, block: Block[T], output: str, array: T) -> None:
        """Save the inputs of the block and raise."""
        stages, where = self.stages, f"{self.prefix}{block.name}"
        views = self._views(np.isfinite(self.model.to_numpy(array)))
        inputs: dict[str, Any] = {name: self._exact(value) for name, value in block.inputs.items()}
        bad = [name for name, value in inputs.items() if not np.isfinite(value).all()]
        step = "" if stages.step is None else f"-step_{stages.step:04}"
        path = make_folder(self.folder) / f"{where}{step}.npz"
        archive = io.BytesIO()
        np.savez(archive, **inputs)  # no `allow_pickle`, which numpy before 2.1 takes for one more array
        write_atomic(path, archive.getvalue())
        document = {
            "block": where,
            "kind": block.kind,
            "stage": stages.name,
            "step": stages.step,
            "views": views,
            "dtype": self.model.dtype,
            "output": {"name": f"{self.prefix}{output}", **_described(array, self.model.to_numpy(array))},
            "inputs": {name: _described(value, inputs[name]) for name, value in block.inputs.items()},
            "file": path.name,
        }
        write_atomic(path.with_suffix(".json"), (json.dumps(document, indent=2) + "\n").encode())
        happened = ["" if stages.step is None else f"step {stages.step}", views[0] if views else ""]
        message = f"NaN or infinity for the first time ({', '.join(filter(None, [str(stages.name), *happened]))})"
        hint = f"{bad[0]}, which the block is given, has some already" if bad else _cause(self.model.dtype)
        raise NumericsError(
            message,
            where=where,
            step=stages.step,
            view=views[0] if views else None,
            path=path,
            hint=f"{hint}; the block's inputs are in {path}",
        )

    def _exact(self, array: T) -> NDArray[Any]:
        """In its own dtype, where numpy has that; bfloat16 as float32."""
        name, values = _dtype(array), self.model.to_numpy(array)
        return values if name == "bfloat16" else values.astype(name)

    def _views(self, finite: NDArray[np.bool_]) -> list[str]:
        """Which views, pictures or texts an output belongs to where it is not finite; empty where it belongs to none."""
        rows: NDArray[np.bool_] = np.all(finite.reshape(len(finite), -1), axis=1)
        match self.stages.name:
            case "condition" | None:
                return []
            case "text_encoder":
                texts = ["negative prompt", "prompt"][-len(rows) :]
                return [text for text, good in zip(texts, rows, strict=False) if not good]
            case "unet" | "upscaler":
                if not self.objects:
                    return []
                numbers = frames_with_nan(finite, objects=self.objects, views=self.views, frames=self.frames)
                names = [f"view {self.stages.first + number}" for number in numbers if number < self.views]
                return names + [f"reference frame {number - self.views}" for number in numbers if number >= self.views]
        return [f"{self.stages.what} {self.first + row}" for row in np.flatnonzero(~rows).tolist()]


def frames_with_nan(finite: NDArray[np.bool_], *, objects: int, views: int, frames: int) -> list[int]:
    """The frames of a U-Net's output where it is not finite, for b objects of f frames, of which the first v are the views.

    Told by the shape: (b, v, h, w, c), (b v, h, w, c) behind the last level, (b f, ...) or tokens (b, f h w, c). Empty for
    others, such as the embedded time (b, c), which is that of all frames.
    """
    rows = len(finite)
    if finite.ndim == 5:
        frames = finite.shape[1]
    elif finite.ndim == 4 and rows == objects * views:
        frames = views
    elif not (rows == objects * frames or (rows == objects and finite.ndim == 3 and finite.shape[1] % frames == 0)):
        return []
    return np.flatnonzero(~finite.reshape(objects, frames, -1).all(axis=(0, 2))).tolist()


def _described(array: Any, values: NDArray[Any]) -> dict[str, Any]:
    """Shape and dtype, how many values are not finite and how large the others are."""
    finite = np.isfinite(values)
    largest = float(np.abs(values[finite].astype(np.float64)).max()) if finite.any() else None
    counts = {"nan": int(np.isnan(values).sum()), "infinite": int(np.isinf(values).sum())}
    return {"shape": list(values.shape), "dtype": _dtype(array), **counts, "largest_finite": largest}


def _shape(array: Any) -> tuple[int, ...]:
    return tuple(array.shape)


def _dtype(array: Any) -> str:
    """float16 of torch.float16 and of mlx.core.float16."""
    return str(array.dtype).rpartition(".")[2]
