"""What a retriever is, as stores and projectors record it."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class ModelIdentity:
    """A retriever by what its tokens depend on; "" where it is not known.

    Attributes:
        architecture: its kind.
        weights: a hash of the backbone's weights.
        processor: a hash of the processor's settings.
        base_projector: a hash of the untouched projection.
    """

    architecture: str
    weights: str
    processor: str
    base_projector: str

    def difference(self, other: ModelIdentity) -> str | None:
        """The name of the first field that differs where both are known; None if none does."""
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine and theirs and mine != theirs:
                return field.name
        return None
