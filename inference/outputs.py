"""The files of one generated video.

::

    <id>.mp4                    all scenes, one chapter each, named by its prompt; how the video was
                                made is in the comment, as JSON
    <id>.json                   the same, and size and SHA-256 of every other file here
    <id>.jpg                    contact sheet
    <id>.poster.jpg             the frame to show before it plays
    <id>.frames/00_0000.png     every frame: scene, frame             (``save_frames``)
    <id>.scenes/00.mp4          every scene as a video                (``save_scenes``)
    <id>.latents/00.safetensors every scene's latents, (F, C, H, W)   (``save_latents``)

The JSON file is written last and makes the others count: a video is finished if it is there and
every file it names has the size and the hash it names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import safetensors.torch
from PIL import Image
from torch import Tensor

from curation.mp4 import open_mp4, write_mp4
from curation.video import Frames
from inference.contact_sheet import ContactSheet
from schemas.layout import Workspace
from schemas.storage import atomic_path, read_json, write_json


@dataclass(frozen=True)
class VideoFiles:
    """Where the files of one video lie: in ``folder``, under names that begin with ``stem``."""

    folder: Path
    stem: str

    @classmethod
    def of(cls, workspace: Workspace, generation_id: str) -> VideoFiles:
        """The files of ``generation_id`` in a workspace."""
        return cls(workspace.videos, generation_id)

    @property
    def video(self) -> Path:
        """The mp4."""
        return self.folder / f"{self.stem}.mp4"

    @property
    def sidecar(self) -> Path:
        """The JSON file."""
        return self.folder / f"{self.stem}.json"

    @property
    def sheet(self) -> Path:
        """The contact sheet."""
        return self.folder / f"{self.stem}.jpg"

    @property
    def poster(self) -> Path:
        """The poster frame."""
        return self.folder / f"{self.stem}.poster.jpg"

    def frame(self, scene: int, frame: int) -> Path:
        """One frame of a scene."""
        return self.folder / f"{self.stem}.frames" / f"{scene:02d}_{frame:04d}.png"

    def scene(self, scene: int) -> Path:
        """The mp4 of one scene."""
        return self.folder / f"{self.stem}.scenes" / f"{scene:02d}.mp4"

    def latents(self, scene: int) -> Path:
        """The latents of one scene."""
        return self.folder / f"{self.stem}.latents" / f"{scene:02d}.safetensors"


class VideoWriter:
    """Writes the files of one video scene by scene; holds one scene in memory.

    Equal scenes and provenance give equal bytes, but for ``seconds`` in the sidecar. Nothing counts
    before :meth:`finish`; a block left without it leaves no mp4 and no sidecar.

    Args:
        files: Where to.
        fps: Frames per second.
        scenes: What each scene shows: its chapter's name and its caption in the contact sheet.
        provenance: How the video was made, JSON-able, with ``prompt_id``.
        save_frames: Also write every frame as PNG.
        save_scenes: Also write every scene as an mp4.
        save_latents: Also write every scene's latents.
    """

    def __init__(
        self,
        files: VideoFiles,
        fps: int,
        scenes: Sequence[str],
        provenance: Mapping[str, Any],
        *,
        save_frames: bool = False,
        save_scenes: bool = False,
        save_latents: bool = False,
    ) -> None:
        self._files = files
        self._fps = fps
        self._scenes = scenes
        self._provenance = provenance
        self._save_frames = save_frames
        self._save_scenes = save_scenes
        self._save_latents = save_latents
        self._sheet = ContactSheet(scenes)
        self._poster: Image.Image | None = None
        self._stack = ExitStack()
        self._written: list[Path] = []
        self._count = 0

    def __enter__(self) -> Self:
        # What a killed process left of this video.
        for old in self._files.folder.glob(f".{self._files.stem}.*.tmp.*"):
            old.unlink(missing_ok=True)
        tags = self._tags(str(self._provenance["prompt_id"]), {})
        self._video = self._stack.enter_context(open_mp4(self._files.video, self._fps, tags))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # After finish() there is nothing left to undo. Otherwise the mp4 must not take its name.
        unfinished = error or RuntimeError("the video was not finished")
        self._stack.__exit__(type(unfinished), unfinished, trace)

    def add_scene(self, frames: Frames, latents: Tensor | None = None) -> None:
        """Write the next scene.

        Args:
            frames: (T, height, width, 3) uint8.
            latents: (F, C, H, W), needed with ``save_latents``.

        Raises:
            InputError: These frames cannot be written as video.
        """
        number, text = self._count, self._scenes[self._count]
        self._video.add(frames, text)
        self._sheet.add(frames)
        if self._poster is None:
            self._poster = Image.fromarray(frames[len(frames) // 2])
        if self._save_frames:
            for i, frame in enumerate(frames):
                self._save_image(Image.fromarray(frame), self._files.frame(number, i))
        if self._save_scenes:
            path = self._files.scene(number)
            write_mp4(path, frames, self._fps, self._tags(text, {"scene": number}))
            self._written.append(path)
        if self._save_latents:
            assert latents is not None, "save_latents needs the latents of every scene"
            path = self._files.latents(number)
            with atomic_path(path) as tmp:
                tensors = {"latents": latents.detach().cpu().contiguous()}
                safetensors.torch.save_file(tensors, tmp)
            self._written.append(path)
        self._count += 1

    def finish(self, seconds: float) -> str:
        """Write contact sheet and poster, let the mp4 take its name, and write the sidecar.

        Args:
            seconds: How long the video took; only in the sidecar.

        Returns:
            SHA-256 of the mp4, 64 hex digits.
        """
        assert self._count == len(self._scenes) and self._poster, "a scene is missing"
        self._save_image(self._sheet.image(), self._files.sheet)
        self._save_image(self._poster, self._files.poster)
        self._stack.close()
        self._written.append(self._files.video)
        facts = {self._name(p): _facts(p) for p in self._written}
        record = {**self._provenance, "files": facts, "seconds": round(seconds, 3)}
        write_json(self._files.sidecar, record)
        return str(facts[self._files.video.name]["sha256"])

    def _tags(self, title: str, more: Mapping[str, Any]) -> dict[str, str]:
        return {
            "title": title,
            "comment": json.dumps({**self._provenance, **more}, sort_keys=True, default=str),
        }

    def _save_image(self, image: Image.Image, path: Path) -> None:
        with atomic_path(path) as tmp:
            image.save(tmp, quality=90)  # PNG takes no notice of the quality
        self._written.append(path)

    def _name(self, path: Path) -> str:
        return path.relative_to(self._files.folder).as_posix()


def finished_sha256(
    files: VideoFiles,
    *,
    save_frames: bool = False,
    save_scenes: bool = False,
    save_latents: bool = False,
) -> str | None:
    """SHA-256 of the mp4 of a finished video, or None if it must be made (again).

    Finished is a video whose sidecar is there, names the files asked for, and every file it names
    has the size and the hash it names.
    """
    try:
        record = read_json(files.sidecar)
        facts: dict[str, dict[str, Any]] = record["files"]
        wanted = {"frames": save_frames, "scenes": save_scenes, "latents": save_latents}
        folders = {name.partition("/")[0] for name in facts}
        if any(asked and f"{files.stem}.{kind}" not in folders for kind, asked in wanted.items()):
            return None
        paths = {name: files.folder / name for name in facts}
        # All sizes before any hash: what is cut short is found without reading.
        if any(p.stat().st_size != facts[name]["size_bytes"] for name, p in paths.items()):
            return None
        if any(_facts(p) != facts[name] for name, p in paths.items()):
            return None
        return str(facts[files.video.name]["sha256"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _facts(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size_bytes": path.stat().st_size, "sha256": sha256}
