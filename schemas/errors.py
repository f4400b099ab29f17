"""The error tree: what failed, where, what was found, what was expected, what to do."""

from __future__ import annotations


class TriptychError(Exception):
    """Base of every error Triptych raises on purpose.

    Args:
        what: One sentence that says what failed.
        where: The id, path, row or config key it happened at.
        found: The offending value or state.
        expected: What would have been right.
        do: What the reader can do about it.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        found: object = None,
        expected: object = None,
        do: str | None = None,
    ) -> None:
        self.what = what
        self.where = where
        self.found = found
        self.expected = expected
        self.do = do
        parts = [what]
        for label, value in (
            ("where", where),
            ("found", found),
            ("expected", expected),
            ("do", do),
        ):
            if value is not None:
                parts.append(f"{label}: {value}")
        super().__init__("\n  ".join(parts))

    def __reduce__(self) -> tuple[object, ...]:
        # Ray and multiprocessing carry errors between processes; keyword arguments need this.
        state = {k: getattr(self, k) for k in ("where", "found", "expected", "do")}
        return _rebuild, (type(self), self.what, state)


def _rebuild(cls: type[TriptychError], what: str, state: dict[str, object]) -> TriptychError:
    return cls(what, **state)  # type: ignore[arg-type]


class ConfigError(TriptychError):
    """A configuration value, key or file is wrong."""


class InputError(TriptychError):
    """Something given to us (a file, a table, a prompt) cannot be used."""


class VideoDecodeError(InputError):
    """A video cannot be opened or decoded.

    ``reason`` is the snake_case word that ends up in the ``rejects`` table.
    """

    def __init__(self, what: str, *, reason: str = "decode_error", **context: object) -> None:
        super().__init__(what, **context)  # type: ignore[arg-type]
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        state = {k: getattr(self, k) for k in ("where", "found", "expected", "do", "reason")}
        return _rebuild, (type(self), self.what, state)


class ManifestError(InputError):
    """A manifest or table is missing, incomplete, inconsistent or of another major version."""


class ReconciliationError(TriptychError):
    """A stage lost or invented records: input is not kept + rejected + failed."""


class TooManyFailures(TriptychError):
    """More records failed than ``max_error_ratio`` allows."""


class DriftTooLarge(TriptychError):
    """A refresh differs more from the one before than ``curation.drift`` allows."""


class TrainingFailed(TriptychError):
    """The training process ended without finishing.

    ``retryable``: it died of something that need not happen again, such as a lost rank, so starting
    it again may help. Not so after an interruption, or where it gave up with an error of ours.
    """

    def __init__(self, what: str, *, retryable: bool = False, **context: object) -> None:
        super().__init__(what, **context)  # type: ignore[arg-type]
        self.retryable = retryable

    def __reduce__(self) -> tuple[object, ...]:
        state = {k: getattr(self, k) for k in ("where", "found", "expected", "do", "retryable")}
        return _rebuild, (type(self), self.what, state)


class CheckpointError(TriptychError):
    """A checkpoint or model folder cannot be loaded as it is."""


class GenerationError(TriptychError):
    """A video could not be generated."""


class ExternalToolError(TriptychError):
    """A program or service we depend on (Ray, Prefect, DeepSpeed) did not do its part."""
