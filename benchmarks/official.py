"""The official code's attention in our transformer, for benchmarks that take its part."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from benchmarks.attention import grouped
from training.attention import Plan
from training.block import Mask2DiTBlock


def attend_the_official_way() -> None:
    """From now on every block copies keys and values for every scene, whatever its mask's name."""
    ours = Mask2DiTBlock.attend

    def attend(self: Mask2DiTBlock, tokens: Tensor, plan: Plan, rotations: Any, _: Any) -> Tensor:
        return ours(self, tokens, plan, rotations, _grouped)

    Mask2DiTBlock.attend = attend  # pyright: ignore[reportAttributeAccessIssue]


def _grouped(query: Tensor, key: Tensor, value: Tensor, plan: Plan) -> Tensor:
    return grouped(query, key, value, len(plan.text_lengths), sum(plan.text_lengths))
