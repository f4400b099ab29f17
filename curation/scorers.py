"""Optional scorers: networks that give a clip a number, each where its weights are configured.

A scorer is named by an id, by the hash of its weights and by what it is shown. Scores are kept
under that name, so only a clip without one is read; thresholds come later (``curation.filters``).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from curation.text_area import TextArea
from curation.video import Frames, ResizeMode
from schemas.config.curation import FiltersConfig, ScorersConfig
from schemas.errors import ConfigError
from schemas.storage import fingerprint, fingerprint_file

AESTHETIC = "aesthetic"
TEXT_AREA = "text_area"


class Scorer(Protocol):
    """A loaded network."""

    @property
    def mode(self) -> ResizeMode:
        """How frames are brought to ``frame_px``."""
        ...

    def frame_px(self, width_px: int, height_px: int) -> tuple[int, int]:
        """Height and width of the frames it wants of an upright picture of this size."""
        ...

    def score(self, frames: Frames) -> float:
        """(T, H, W, 3) uint8 RGB to a clip's score."""
        ...


@dataclass(frozen=True)
class NamedScorer:
    """What a score depends on besides the clip.

    Attributes:
        scorer_id: ``AESTHETIC`` or ``TEXT_AREA``.
        weights_sha256: Hash of all its weight files, wherever they lie.
        settings: How many frames it is shown, and how large, where that can be set.
    """

    scorer_id: str
    weights_sha256: str
    settings: tuple[int, ...]


def named_scorers(cfg: ScorersConfig, filters: FiltersConfig) -> tuple[NamedScorer, ...]:
    """The configured scorers. Reads their files once, for the hashes, and loads none.

    Raises:
        ConfigError: A threshold is set without the weights it needs, only one of two files that
            belong together is given, or a file is missing.
        CheckpointError: The CLIP folder lacks a file.
    """
    _check(cfg, filters)
    scorers: list[NamedScorer] = []
    if cfg.clip is not None and cfg.aesthetic_head is not None:
        from curation.openclip import clip_files  # torch takes seconds to import

        files = [*clip_files(Path(cfg.clip)), Path(cfg.aesthetic_head)]
        scorers.append(NamedScorer(AESTHETIC, _hash(files), (cfg.frames_per_clip,)))
    if cfg.text_detector is not None:
        settings = (cfg.frames_per_clip, cfg.text_height_px)
        scorers.append(NamedScorer(TEXT_AREA, _hash([Path(cfg.text_detector)]), settings))
    return tuple(scorers)


def load_scorer(scorer_id: str, cfg: ScorersConfig) -> Scorer:
    """One of the configured scorers.

    Raises:
        CheckpointError: Its weights cannot be used.
    """
    if scorer_id == AESTHETIC:
        from curation.aesthetic import Aesthetic

        assert cfg.clip is not None and cfg.aesthetic_head is not None
        return Aesthetic(Path(cfg.clip), Path(cfg.aesthetic_head))
    assert scorer_id == TEXT_AREA and cfg.text_detector is not None
    return TextArea(Path(cfg.text_detector), cfg.text_height_px)


def _check(cfg: ScorersConfig, filters: FiltersConfig) -> None:
    for threshold, value, weights, given in (
        ("min_aesthetic", filters.min_aesthetic, "aesthetic_head", cfg.aesthetic_head),
        ("max_text_ratio", filters.max_text_ratio, "text_detector", cfg.text_detector),
    ):
        if value is not None and given is None:
            raise ConfigError(
                "a threshold is set for a score that nothing computes",
                where=f"curation.filters.{threshold}",
                found=f"{value:g}, and no curation.scorers.{weights}",
                do=f"give the weights as curation.scorers.{weights}, or empty the threshold",
            )
    if (cfg.clip is None) != (cfg.aesthetic_head is None):
        raise ConfigError(
            "the aesthetic score needs a CLIP model and a head",
            where="curation.scorers",
            found="only clip" if cfg.clip is not None else "only aesthetic_head",
            do="give both curation.scorers.clip and curation.scorers.aesthetic_head, or neither",
        )
    for key in ("aesthetic_head", "text_detector"):
        path = getattr(cfg, key)
        if path is not None and not Path(path).is_file():
            raise ConfigError(
                "a file with weights is not there",
                where=f"curation.scorers.{key}",
                found=path,
                do="give the path of a file that this machine has",
            )


def _hash(files: list[Path]) -> str:
    hashes = [fingerprint_file(path) for path in files]
    return hashes[0] if len(hashes) == 1 else fingerprint(hashes)
