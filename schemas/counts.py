"""Counts that reconcile: every record a stage receives is kept, rejected or failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from schemas.errors import ReconciliationError, TooManyFailures


@dataclass(frozen=True)
class StageCount:
    """What became of the records of one stage.

    Attributes:
        stage: Stage name, e.g. ``"shots"``.
        unit: What one record is, e.g. ``"source"``.
        input: Records the stage received.
        kept: Records that went on.
        rejected: Records left out by a rule; ``reasons`` says which.
        failed: Records that met an unexpected error; ``reasons`` says which.
        reused: Of the records handled, those whose result an earlier run had already written.
        produced: Records of the next kind this stage made (shots from sources, windows from
        clips), or
            None where kept records are the output.
        seconds: Wall-clock time of the stage.
        reasons: Count per reason over rejected and failed records.
    """

    stage: str
    unit: str
    input: int
    kept: int
    rejected: int = 0
    failed: int = 0
    reused: int = 0
    produced: int | None = None
    seconds: float = 0.0
    reasons: dict[str, int] = field(default_factory=dict[str, int])

    def check(self) -> StageCount:
        """Return self if the counts reconcile.

        Raises:
            ReconciliationError: ``input != kept + rejected + failed``, or the reasons do not add
            up.
        """
        if self.input != self.kept + self.rejected + self.failed:
            raise ReconciliationError(
                "counts do not reconcile: records were lost or counted twice",
                where=f"stage {self.stage!r}, unit {self.unit!r}",
                found=f"input {self.input}, kept {self.kept}, rejected {self.rejected}, failed "
                f"{self.failed}",
                expected="input = kept + rejected + failed",
                do="this is a bug in Triptych: please report it with the run directory",
            )
        if sum(self.reasons.values()) != self.rejected + self.failed:
            raise ReconciliationError(
                "rejected and failed records without a reason, or reasons without a record",
                where=f"stage {self.stage!r}",
                found=f"{self.rejected} rejected + {self.failed} failed, reasons {self.reasons}",
                expected="one reason per rejected or failed record",
                do="this is a bug in Triptych: please report it with the run directory",
            )
        return self

    def check_failures(self, max_error_ratio: float) -> StageCount:
        """Return self if the share of failed records is at most ``max_error_ratio``.

        Raises:
            TooManyFailures: names the three commonest reasons.
        """
        if self.input and self.failed / self.input > max_error_ratio:
            top = ", ".join(f"{n} x {r}" for r, n in Counter(self.reasons).most_common(3))
            raise TooManyFailures(
                f"{self.failed} of {self.input} {self.unit} records failed",
                where=f"stage {self.stage!r}",
                found=top,
                expected=f"a share of at most {max_error_ratio:g} (max_error_ratio)",
                do="look at the rejects table, mend the cause and run again, or raise "
                "max_error_ratio",
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain dict for JSON and tables."""
        return asdict(self)


def count_reasons(reasons: Iterable[str]) -> dict[str, int]:
    """Count reasons, commonest first, ties by name."""
    counted = Counter(reasons)
    return dict(sorted(counted.items(), key=lambda item: (-item[1], item[0])))
