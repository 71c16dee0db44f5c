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
    no gradients are taken; with gradients every piece is kept. Raises OptionError.
    """

    implementation: AttentionImplementation = "fused"
    budget_bytes: int = 2**28

    def __post_init__(self) -> None:
        if self.implementation not in get_args(AttentionImplementation):
            allowed = ", ".join(get_args(AttentionImplementation))
            raise OptionError("implementation", expected=f"one of {allowed}", got=self.implementation)
        if self.budget_bytes < 1:
            raise OptionError("budget_bytes", expected="at least 1", got=self.budget_bytes)


FUSED = AttentionOptions()


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
