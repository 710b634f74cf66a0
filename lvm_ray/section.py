"""The base of every recipe section: strict types, unknown keys refused, values that cannot change."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of a recipe. Every field is documented by its `description`; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
