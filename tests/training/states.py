"""Trained state as ZeRO cuts it over ranks, without DeepSpeed."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from training.zero_state import KINDS, Fragment


@dataclass
class Cut:
    """The state of one rank among several, cut as ZeRO cuts it: a flat vector in equal parts."""

    fragments: list[Fragment]
    shapes: dict[str, tuple[int, ...]]
    step: int = 0
    published: list[int] = field(default_factory=list)

    def set_step(self, step: int) -> None:
        self.step = step

    def publish(self) -> None:
        self.published.append(self.step)


def cut(values: dict[str, dict[str, Tensor]], rank: int, ranks: int) -> Cut:
    names = list(values["weight"])
    sizes = [values["weight"][n].numel() for n in names]
    share = -(-sum(sizes) // ranks)
    fragments, begin = [], 0
    for name, size in zip(names, sizes, strict=True):
        low, high = max(begin, rank * share), min(begin + size, (rank + 1) * share)
        if low < high:
            here = {k: values[k][name].flatten()[low - begin : high - begin].clone() for k in KINDS}
            fragments.append(Fragment(name, low - begin, here, written=True))
        begin += size
    return Cut(fragments, {n: tuple(values["weight"][n].shape) for n in names})
