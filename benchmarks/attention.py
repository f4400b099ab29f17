"""Masked attention (v2) side by side: time and peak memory of one layer.

Usage: python -m benchmarks.attention [--gpu] [--repeat 5] [--out build/bench/attention.json]

``lse`` is ours. Peers: ``grouped``, the official code's way, written here from its description
(every scene gets its own copy of all video keys and values, behind its text); ``bool mask``,
torch's attention given an (L, L) mask; ``flex``, FlexAttention with our block mask; ``no mask``,
one torch call in which everything sees everything: the least that any exact method can need.

Times are medians of interleaved repetitions, each after a warm-up: on a CPU processor seconds of
all threads, so that other work on the machine counts little. Peak memory counts all a call needs:
inputs, mask, output, and for the backward pass the outer and the inner gradients. On a GPU it is
torch's own peak of allocated bytes. On a CPU each case runs in a process of its own, forked after
a tiny case has loaded the kernels: the largest resident set, less the one before the inputs were
made, with malloc told to hand freed blocks back at once. FlexAttention on CPU runs forward only,
and its memory is left out: the compiler's would count.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.tables import target, write_report
from training.attention import Plan, attend
from training.lse_attention import choose_kernel
from training.masks import dense_mask

OURS, GROUPED, MASKED, FLEX, BARE = NAMES = ("lse", "grouped", "bool mask", "flex", "no mask")
PRODUCT = "a bf16 matrix product of as many operations"
M_MMAP_THRESHOLD = -3  # from malloc.h


@dataclass(frozen=True)
class Case:
    """One layer's attention over equal scenes, as the official code needs them."""

    scenes: int
    text: int
    video: int
    heads: int
    batch: int
    device: str
    dtype: torch.dtype
    backward: bool = False
    width: int = 64

    @property
    def tokens(self) -> int:
        """Length of the sequence."""
        return self.scenes * (self.text + self.video)

    @property
    def flop(self) -> float:
        """Operations v2 needs: two matrix products forward, five more backward."""
        text, video = self.scenes * self.text, self.scenes * self.video
        pairs = video**2 + 2 * self.text * video + self.text * text
        return 2.0 * self.batch * self.heads * self.width * pairs * (7 if self.backward else 2)

    def __str__(self) -> str:
        return (
            f"{'forward and backward' if self.backward else 'forward'}, {self.scenes} x "
            f"({self.text} + {self.video}) tokens, {self.heads} heads, batch {self.batch}"
        )


Table = dict[tuple[Case, str], float | None]
BOTH = (False, True)
# CogVideoX-5B at 49 frames of 480 x 720 pixels, and a small likeness for a CPU
ON_GPU, ON_CPU = ("cuda", torch.bfloat16), ("cpu", torch.float32)
GPU_SIZES = ((3, 1), (6, 1), (10, 1), (3, 2))  # scenes, batch
GPU = [Case(s, 226, 17550, 48, b, *ON_GPU, way) for s, b in GPU_SIZES for way in BOTH]
CPU = [Case(3, 15, 1000, 8, b, *ON_CPU, way) for b in (1, 2) for way in BOTH]
CPU_GROWTH = [Case(s, 15, 300, 8, 1, *ON_CPU, way) for s in (2, 3, 4, 6, 8, 10) for way in BOTH]


def main() -> None:
    """Measure, print, write the JSON and the plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpu", action="store_true", help="the real sizes, on a CUDA device")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("build/bench/attention.json"))
    args = parser.parse_args()
    cases = GPU if args.gpu else CPU
    growth = [case for case in GPU if case.batch == 1] if args.gpu else CPU_GROWTH
    # memory first: a forked process must not inherit threads that have computed
    measure = peak_on_gpu if args.gpu else peak_on_cpu
    memory: Table = {
        (case, name): measure(case, name)
        for case in dict.fromkeys([*cases, *growth])
        for name in NAMES
        if args.gpu or name != FLEX
    }
    seconds: Table = {}
    for case in cases:
        seconds |= times(case, args.repeat)
    if args.gpu:
        rate = matrix_rate()
        seconds |= {(case, PRODUCT): case.flop / rate for case in cases}
    rows = [
        *(_row(case, name, seconds, "ms", 1e3) for case, name in seconds if name != OURS),
        *(_row(case, name, memory, "MB", 1e-6) for case, name in memory if name != OURS),
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    _plot([case for case in growth if case.backward], memory, args.out.with_suffix(".svg"))
    about = " ".join((__doc__ or "").split("\n\n", 2)[2].split())
    targets = _targets(cases, growth, seconds, memory)
    write_report(args.out, "Masked attention", about, rows, targets, _machine(args.gpu))


def runner(case: Case, name: str) -> Callable[[], None]:
    """A call to measure; its inputs are made here."""
    generator = torch.Generator(case.device).manual_seed(0)
    like: Any = {"device": case.device, "dtype": case.dtype, "generator": generator}
    shape = (case.batch, case.heads, case.tokens, case.width)
    query, key, value = (torch.randn(shape, **like).requires_grad_(case.backward) for _ in "qkv")
    # the layer after attention gives back a gradient whose memory is in the order (B, L, N, E)
    outer = torch.randn(shape, **like) if case.backward else None
    if outer is not None:
        outer = outer.view(shape[0], shape[2], shape[1], shape[3]).transpose(1, 2)
    lengths = ((case.text,) * case.scenes, (case.video,) * case.scenes)
    backend: Any = "dense" if name == MASKED else name

    def call() -> None:
        if name == GROUPED:
            out = grouped(query, key, value, case.scenes, case.scenes * case.text)
        elif name == BARE:
            out = scaled_dot_product_attention(query, key, value)
        else:
            out = attend(query, key, value, Plan("v2", *lengths, backend))
        if outer is not None:
            torch.autograd.grad(out, (query, key, value), outer)
        if case.device == "cuda":
            torch.cuda.synchronize()

    return call


def grouped(query: Tensor, key: Tensor, value: Tensor, scenes: int, border: int) -> Tensor:
    """The official code's way: per scene, all video keys copied behind the scene's text keys.

    Args:
        query: (B, N, L, E), the texts of all scenes before their videos.
        key: Likewise.
        value: Likewise.
        scenes: Scenes, of equal lengths.
        border: Text tokens of all scenes.
    """

    def by_scene(x: Tensor) -> tuple[Tensor, Tensor]:
        """Text and video of (B, N, L, E) as (S * B, N, tokens of a scene, E)."""
        text, video = x[:, :, :border], x[:, :, border:]
        return torch.cat(text.chunk(scenes, 2)), torch.cat(video.chunk(scenes, 2))

    (text_q, video_q), (text_k, video_k), (text_v, video_v) = map(by_scene, (query, key, value))
    text = scaled_dot_product_attention(
        text_q, torch.cat([text_k, video_k], 2), torch.cat([text_v, video_v], 2)
    )
    all_k, all_v = (x[:, :, border:].repeat(scenes, 1, 1, 1) for x in (key, value))
    video = scaled_dot_product_attention(
        video_q, torch.cat([text_k, all_k], 2), torch.cat([text_v, all_v], 2)
    )
    return torch.cat([*text.chunk(scenes), *video.chunk(scenes)], 2)


def times(case: Case, repeat: int) -> Table:
    """Median seconds of each way, taken in turns; None where memory does not suffice."""
    spent: dict[str, list[float]] = {
        name: [] for name in NAMES if case.device != "cpu" or name != FLEX or not case.backward
    }
    failed: set[str] = set()
    for _ in range(repeat):
        for name in [n for n in spent if n not in failed]:
            try:
                call = runner(case, name)
                call()
                spent[name].append(clock(call, case.device))
            except torch.OutOfMemoryError:
                failed.add(name)
    return {(case, n): None if n in failed else statistics.median(s) for n, s in spent.items()}


def clock(call: Callable[[], None], device: str) -> float:
    """Seconds of one call: processor time on a CPU, time passed on a GPU."""
    now = time.process_time if device == "cpu" else time.perf_counter
    started = now()
    call()
    return now() - started


def peak_on_gpu(case: Case, name: str) -> int | None:
    """Peak bytes torch has allocated, inputs included; None where there are not enough."""
    dense_mask.cache_clear()
    torch.cuda.empty_cache()
    try:
        call = runner(case, name)
        call()  # compiles, and fills caches that stay
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated()
    except torch.OutOfMemoryError:
        return None


def peak_on_cpu(case: Case, name: str) -> int:
    """Bytes by which the resident set of a process of its own grows, at most."""
    reader, writer = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_grow, args=(writer, case, name))
    child.start()
    grown = int(reader.recv())
    child.join()
    return grown


def _grow(writer: Any, case: Case, name: str) -> None:
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    runner(Case(2, 2, 5, 1, 1, "cpu", case.dtype, case.backward), name)()
    before = psutil.Process().memory_info().rss
    runner(case, name)()
    writer.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)


def matrix_rate() -> float:
    """Operations per second of a large bf16 matrix product on this GPU."""
    size, products = 8192, 20
    a, b = torch.randn(2, size, size, device="cuda", dtype=torch.bfloat16).unbind()

    def call() -> None:
        for _ in range(products):
            torch.mm(a, b)
        torch.cuda.synchronize()

    call()
    return products * 2 * size**3 / statistics.median(clock(call, "cuda") for _ in range(5))


def _row(case: Case, peer: str, table: Table, unit: str, scale: float) -> dict[str, Any]:
    """A ratio above 1 says that ours needs less."""
    ours, other = (table[case, name] for name in (OURS, peer))
    shown = [None if x is None else round(x * scale, 2) for x in (ours, other)]
    ratio = round(other / ours, 3) if ours and other else None
    what = f"{case}: lse beside {peer}"
    return {"case": what, "ours": shown[0], "peer": shown[1], "ratio": ratio, "unit": unit}


def _targets(
    cases: list[Case], growth: list[Case], seconds: Table, memory: Table
) -> list[dict[str, Any]]:
    """The worst case of each promise; a case in which a side ran out of memory says nothing."""

    def ratios(table: Table, over: str, under: str, backward: bool) -> list[float]:
        pairs = [(table[c, over], table[c, under]) for c in cases if c.backward == backward]
        return [a / b for a, b in pairs if a and b]

    def bending(backward: bool) -> float:
        grown = [(c.tokens, memory[c, OURS] or 0) for c in growth if c.backward == backward]
        few, some, many = grown[0], grown[len(grown) // 2], grown[-1]
        slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in ((few, some), (some, many))]
        return slopes[1] / slopes[0]

    found: list[dict[str, Any]] = []
    least = 1.15 if cases[0].device == "cuda" else 1.0
    for way, what in zip(BOTH, ("forward", "forward and backward"), strict=True):
        for name, value, limit, at_most in (
            ("memory over no mask", max(ratios(memory, OURS, BARE, way)), 1.15, True),
            ("speed over grouped", min(ratios(seconds, GROUPED, OURS, way)), least, False),
            ("memory per further token, many scenes over few", bending(way), 1.1, True),
        ):
            found.append(target(f"{what}: {name}", value, limit, at_most=at_most))
    return found


def _machine(gpu: bool) -> dict[str, Any]:
    machine: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if gpu:
        machine |= {"gpu": torch.cuda.get_device_name()}
        machine |= {"kernel": choose_kernel(torch.device("cuda"), torch.bfloat16, 64)[1]}
    return machine


def _plot(growth: list[Case], memory: Table, out: Path) -> None:
    """Peak memory over the number of scenes."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for name in (OURS, GROUPED, MASKED, BARE):
        known = [(case.scenes, peak / 1e6) for case in growth if (peak := memory[case, name])]
        axes.plot([x for x, _ in known], [y for _, y in known], marker="o", label=name)
    axes.set(xlabel="scenes", ylabel="peak memory, MB", ylim=(0, None))
    axes.set_title(f"forward and backward of one layer, {growth[0].video} video tokens per scene")
    axes.legend()
    figure.savefig(out)


if __name__ == "__main__":
    main()
