"""How attention is computed: the choice that both backends take, and the plan of its sliced form."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from mvshared.errors import OptionError

AttentionImplementation = Literal["fused", "plain", "sliced"]

SCORE_BYTES = 4  # scores are float32 whatever the model's dtype

FUSED_WIDTHS = (64, 72, 80, 96, 128)  # of heads that MLX's kernel takes on Metal


def fused_width(width: int) -> int | None:
    """The width that heads are filled up to with zeros for MLX's kernel on Metal; None if they are too wide for it."""
    return min((each for each in FUSED_WIDTHS if each >= width), default=None)


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """`fused` is the library's kernel, `plain` writes the softmax out, `sliced` is `plain` in pieces.

    A piece's float32 score matrix stays within `budget_bytes`; a single row of it is the smallest piece, so a budget below
    4 bytes per key counts as one row. MLX, which evaluates lazily, has about ten pieces in flight. Slicing saves memory where
    no gradients are taken; with gradients every piece is kept.

    `kv_pooling` 2 is faster and another result: at the U-Net's finest level with attention, queries attend to the averages of
    the keys and values of 2x2 pixels, within every view and every reference frame (ToDo, arXiv 2402.13573). 1 is exact. Raises
    OptionError.
    """

    implementation: AttentionImplementation = "fused"
    budget_bytes: int = 2**28
    kv_pooling: int = 1

    def __post_init__(self) -> None:
        if self.implementation not in get_args(AttentionImplementation):
            allowed = ", ".join(get_args(AttentionImplementation))
            raise OptionError("implementation", expected=f"one of {allowed}", got=self.implementation)
        if self.budget_bytes < 1:
            raise OptionError("budget_bytes", expected="at least 1", got=self.budget_bytes)
        if self.kv_pooling not in (1, 2):
            raise OptionError("kv_pooling", expected="1 or 2", got=self.kv_pooling)


FUSED = AttentionOptions()


def check_pooling(kv_pooling: int, height: int, width: int) -> None:
    """Raise OptionError unless a map of pixels can be cut into squares of that side."""
    if height % kv_pooling or width % kv_pooling:
        expected = f"1 where the finest attention is over {height}x{width} pixels"
        raise OptionError("kv_pooling", expected=expected, got=kv_pooling, hint="take a size that is twice as divisible")


def score_slices(*, heads: int, queries: int, keys: int, budget_bytes: int) -> Iterator[tuple[slice, slice]]:
    """Cut scores (heads, queries, keys) into pieces of at most `budget_bytes`: slices of the heads and of the queries.

    Whole heads together while they fit, else blocks of one head's queries. `heads` counts those of all objects.
    """
    rows = max(1, budget_bytes // (SCORE_BYTES * keys))
    heads_step = max(1, rows // queries)
    queries_step = min(rows, queries)
    for head in range(0, heads, heads_step):
        for query in range(0, queries, queries_step):
            yield slice(head, min(head + heads_step, heads)), slice(query, min(query + queries_step, queries))
