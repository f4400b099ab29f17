"""Where videos are made: in this process, or in Ray actors. The only file of inference with Ray.

One copy of the model without a GPU works in this process: starting Ray takes as long as many a
small batch. Everything else works in actors, which may die without taking the batch along. Both
are called the same way and make the same bytes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from inference.actor import VideoMaker
from inference.schedule import IN_FLIGHT
from schemas.config import TriptychConfig
from schemas.errors import ConfigError, TriptychError
from training.cache import LatentCache

log = logging.getLogger(__name__)

WORTH_AN_ACTOR = 1e12
"""FLOPs that pay for the start of another actor on a CPU: about half a minute of one core."""


class Actor(Protocol):
    """Something that calls a VideoMaker's methods, two at a time."""

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        """Start a call."""
        ...

    def cause(self, error: BaseException) -> BaseException | None:
        """What a call raised, or None if the actor is dead."""
        ...

    def close(self) -> None:
        """End it, whatever it is at."""
        ...


class LocalActor:
    """In this process."""

    def __init__(self, maker: VideoMaker) -> None:
        self._maker = maker
        self._threads_before = torch.get_num_threads()
        self._calls = ThreadPoolExecutor(IN_FLIGHT)

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        """Start a call."""
        return self._calls.submit(getattr(self._maker, method), *arguments)

    def cause(self, error: BaseException) -> BaseException:
        """What a call raised."""
        return error

    def close(self) -> None:
        """Wait for the denoising step it is at."""
        self._maker.stop()
        self._calls.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads_before)


class RayActor:
    """In a process of its own. It is not restarted, and dies with this process."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        """Start a call."""
        return getattr(self._handle, method).remote(*arguments).future()

    def cause(self, error: BaseException) -> BaseException | None:
        """What a call raised, or None if the actor is dead."""
        from ray.exceptions import RayError, RayTaskError

        if isinstance(error, RayTaskError):
            inner = getattr(error, "cause", None)
            return inner if isinstance(inner, TriptychError) else error
        return None if isinstance(error, RayError) else error

    def close(self) -> None:
        """Kill it."""
        import ray

        ray.kill(self._handle)


class Pool:
    """The actors of a batch.

    Args:
        count: How many there are to be.
        make: Makes one.
    """

    def __init__(self, count: int, make: Callable[[], Actor]) -> None:
        self._make = make
        self.actors = [make() for _ in range(count)]

    def replace(self, dead: Actor) -> Actor:
        """A fresh actor in place of a dead one."""
        dead.close()  # it may only be out of reach
        fresh = self._make()
        self.actors[self.actors.index(dead)] = fresh
        return fresh


@contextmanager
def open_pool(
    config: TriptychConfig, model_dir: Path, cache: LatentCache, tasks: int, flops: float
) -> Generator[Pool]:
    """Start as many actors as are configured, or as there is room and work for.

    Args:
        config: All that an actor needs.
        model_dir: Model folder; every machine must see it, and the workspace, at the same path.
        cache: Where encoded texts lie.
        tasks: Micro-batches there are; no more actors than that.
        flops: Of all of them.

    Raises:
        ConfigError: There is no room for the actors.
        ExternalToolError: Ray does not start or cannot be reached.
    """
    generation, engine = config.generation, config.engine
    wanted = generation.actors
    local = not torch.cuda.is_available() and engine.ray_address is None
    if local and not wanted:
        room = max(1, engine.num_cpus // generation.threads)
        wanted = min(room, max(1, math.ceil(flops / WORTH_AN_ACTOR)))
    arguments = (config, model_dir.absolute(), cache)
    with ExitStack() as at_end:
        if local and min(wanted, tasks) == 1:
            pool = Pool(1, lambda: LocalActor(VideoMaker(*arguments)))
        else:
            pool = _ray_pool(config, wanted, tasks, arguments, at_end)
        at_end.callback(lambda: [actor.close() for actor in pool.actors])
        log.info("actors=%d ray=%s", len(pool.actors), isinstance(pool.actors[0], RayActor))
        yield pool


def _ray_pool(
    config: TriptychConfig, wanted: int, tasks: int, arguments: tuple[Any, ...], at_end: ExitStack
) -> Pool:
    """Actors with a GPU each where there are any, else with their threads' CPUs; 0 = all there is.

    Ray is stopped in the end if it was started here.
    """
    import ray  # takes seconds; one local actor does without

    from curation.pipeline import start_ray, stop_ray

    if not ray.is_initialized():
        at_end.callback(stop_ray)
        start_ray(config.engine)
    nodes: list[Mapping[str, float]] = [n["Resources"] for n in ray.nodes() if n["Alive"]]
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    threads = config.generation.threads
    room = gpus or sum(int(node.get("CPU", 0) / threads) for node in nodes)
    if wanted > room or not room:
        raise ConfigError(
            "Ray has no room for the actors that generate",
            where="generation.actors",
            found=f"{wanted or 1} actors" + ("" if gpus else f" of {threads} CPUs each"),
            expected=f"at most {room}: Ray has {gpus or room * threads} "
            + ("GPUs" if gpus else "CPUs that fit"),
            do="set generation.actors or generation.threads lower, or give Ray more "
            "(engine.num_cpus, engine.ray_address)",
        )
    # CPUs are not what limits actors with a GPU, and a local Ray may be told of few.
    cpus = 0 if gpus else threads
    make = cast("Any", ray.remote)(
        num_cpus=cpus, num_gpus=int(gpus > 0), max_concurrency=IN_FLIGHT, max_restarts=0
    )(VideoMaker)
    return Pool(min(wanted or room, tasks), lambda: RayActor(make.remote(*arguments)))
