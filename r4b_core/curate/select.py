"""Choosing by difficulty: pass-rate bands, quotas, a token budget, mixing, and R-4B's rules for the mode.

MMFineReason (section 3.3) keeps by pass rate: 0 of 4 makes its 123K set, anything but 4 of 4 its 586K set. R-4B
(section 2.1) makes bi-mode annealing data of the same scores. What is chosen depends on the seed and the records'
keys, and on nothing else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from r4b_core.config.recipe import Settings

PRESETS: dict[str, dict[str, Any]] = {
    "mmfr-123k": {"pass_rate": "[0, 0]", "min_tries": 4, "modes": "thinking"},
    "mmfr-586k": {"pass_rate": "[0, 1)", "min_tries": 4, "modes": "thinking"},
}
_BAND = re.compile(r"([\[(])\s*(\d*\.?\d+)\s*,\s*(\d*\.?\d+)\s*([\])])")


@dataclass(frozen=True)
class Band:
    """An interval of pass rates that says of each end whether it belongs."""

    low: float
    high: float
    with_low: bool
    with_high: bool

    @classmethod
    def parse(cls, text: str) -> Band:
        """Read ``[0, 1)``.

        Raises:
            ValueError: if it is no interval within 0 and 1, or an empty one.
        """
        match = _BAND.fullmatch(text.strip())
        if match is None:
            raise ValueError(f'{text!r} is no interval: write "[0, 1)", where [ ] take the end in and ( ) leave it out')
        band = cls(float(match[2]), float(match[3]), match[1] == "[", match[4] == "]")
        if not 0 <= band.low <= band.high <= 1:
            raise ValueError(f"{text!r}: a pass rate lies within 0 and 1, and the lower end comes first")
        if band.low == band.high and not (band.with_low and band.with_high):
            raise ValueError(f"{text!r} is empty: write [{match[2]}, {match[3]}] for this one value")
        return band

    def holds(self, rate: float) -> bool:
        above = rate >= self.low if self.with_low else rate > self.low
        return above and (rate <= self.high if self.with_high else rate < self.high)


class GeneralSettings(Settings):
    """Other data to mix in, so that a hard selection does not lose what is easy."""

    folder: str | None = Field(None, description="of records: a stage's output, or Parquet files of the same schema")
    share: float | None = Field(None, gt=0, lt=1, description="of the whole result")
    count: int | None = Field(None, ge=1, description="records, at most")

    @model_validator(mode="after")
    def _share_or_count(self) -> GeneralSettings:
        if self.folder is not None and (self.share is None) == (self.count is None):
            raise ValueError("general.folder needs either general.share or general.count")
        if self.folder is None and (self.share or self.count):
            raise ValueError("general.share and general.count need general.folder")
        return self


class SelectSettings(Settings):
    """What is kept of scored records."""

    preset: Literal["mmfr-123k", "mmfr-586k"] | None = Field(None, description="MMFineReason's two published sets")
    pass_rate: str | None = Field(None, description='interval such as "[0, 1)": [ ] take the end in, ( ) leave it out')
    min_tries: int = Field(4, ge=1, description="judged tries without which a pass rate says nothing")
    modes: Literal["keep", "thinking", "r4b"] = Field(
        "keep", description="mode of a record: as it is; thinking for all; by R-4B's rules"
    )
    quotas: dict[str, int] = Field(default_factory=dict, description='records of a source, at most; "*": of any other')
    target_tokens: int | None = Field(None, ge=1, description="tokens of all responses together, at most")
    general: GeneralSettings = GeneralSettings()

    @field_validator("pass_rate")
    @classmethod
    def _is_interval(cls, text: str | None) -> str | None:
        if text is not None:
            Band.parse(text)
        return text

    @field_validator("quotas")
    @classmethod
    def _quotas_are_counts(cls, quotas: dict[str, int]) -> dict[str, int]:
        if negative := {source: quota for source, quota in quotas.items() if quota < 0}:
            raise ValueError(f"a quota is a count of records, not {negative}")
        return quotas
