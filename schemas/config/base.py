"""The base of all configs: frozen, no unknown keys, a stable hash."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from schemas.storage import fingerprint


class StageConfig(BaseModel):
    """A frozen config. Unknown keys are errors; fields are described with unit and range."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    def hash(self) -> str:
        """Sixteen hex digits that change with any value."""
        return fingerprint(self.model_dump(mode="json"))
