"""Prompts from files of records, read at any place: for reinforcement learning, probes and evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from r4b_core.config.recipe import UNKNOWN_BAND, Band
from r4b_core.data.encoding import EncodedPrompt
from r4b_core.data.files import NEEDED, RATES, RecordFiles, record_of
from r4b_core.data.processing import PromptError
from r4b_core.data.records import Record, to_sample
from r4b_core.data.schema import Sample
from r4b_core.data.stream import Bad, RecordProcessor, TooLong, reason_of

COLUMNS = (*NEEDED, *RATES)
MAX_REST = 7


@dataclass(frozen=True)
class Prompt:
    """A question as it goes to the engine."""

    sample: Sample
    encoded: EncodedPrompt


class Prompts:
    """Random access to the prompts of some files.

    Args:
        room: most tokens of a prompt (what the packing capacity leaves beside a response).
    """

    def __init__(self, files: RecordFiles, processor: RecordProcessor, room: int) -> None:
        self.files, self.processor, self.room = files, processor, room
        self._starts = np.cumsum([0, *(group.rows for group in files.groups)])

    def __len__(self) -> int:
        return self.files.rows

    def rates(self) -> NDArray[np.float64]:
        """The pass rate of every record, NaN where none was measured."""
        rates = np.full(len(self), np.nan)
        for place, (_, _, row) in enumerate(self.files.scan(("tries", "right"))):
            rate = Record("", "", "", tries=row.get("tries"), right=row.get("right")).pass_rate
            rates[place] = np.nan if rate is None else rate
        return rates

    def read(self, places: Sequence[int]) -> list[Prompt | Bad]:
        """The prompts at these places, in order; what cannot be used comes back with the reason."""
        where = np.asarray(places, dtype=np.int64)
        groups = np.searchsorted(self._starts, where, side="right") - 1
        made: dict[int, Prompt | Bad] = {}
        for group in np.unique(groups).tolist():
            here = where[groups == group]
            rows = self.files.read(group, here - self._starts[group], COLUMNS)
            for place in here.tolist():
                row = rows[place - int(self._starts[group])]
                if row["id"] is None:
                    row["id"] = f"row {place}"
                made[place] = self._prompt(record_of(row))
        return [made[place] for place in where.tolist()]

    def _prompt(self, record: Record) -> Prompt | Bad:
        try:
            if not record.answer:
                raise PromptError("there is no reference answer to compare with")
            sample = to_sample(record, response=False)
            encoded = self.processor.encode_prompt(sample)
            if encoded.num_tokens > self.room:
                raise TooLong(
                    f"prompt of {encoded.num_tokens} tokens: packing.capacity leaves {self.room} beside a response"
                )
        except ValueError as error:
            return Bad(record.key, reason_of(error), str(error))
        return Prompt(sample, encoded)


def choose(count: int, of: int, seed: int) -> list[int]:
    """``count`` different places (all, where there are fewer), the same for the same arguments, in order."""
    return sorted(np.random.default_rng([seed, 0x9E37]).permutation(of)[:count].tolist())


class PromptSampler:
    """Draws prompts by bands of pass rate, those first that were drawn least; re-scored as the policy learns.

    A prompt's pass rate begins as the files' and moves by ``rate_update`` towards the share of right answers in each of
    its groups. A group whose rewards are all equal teaches nothing: its prompt rests for one round, and for up to
    ``MAX_REST`` rounds when that happens again and again.

    Args:
        rates: pass rate of every prompt, NaN where it is unknown.
        bands: share of each band, as ``bpo.bands``; empty: all prompts alike.

    Raises:
        ValueError: a band that has a share and no prompt at all.
    """

    def __init__(self, rates: NDArray[np.float64], bands: dict[str, float], seed: int, rate_update: float) -> None:
        self._rates, self._seed, self._rate_update = rates.copy(), seed, rate_update
        self._due = np.zeros(len(rates), np.int64)
        self._streak = np.zeros(len(rates), np.int64)
        self._dropped = np.zeros(len(rates), bool)
        self._seen: set[int] = set()
        self._shares = {name: share / sum(bands.values()) for name, share in bands.items() if share}
        empty = [name for name in self._shares if not self._members(name).any()]
        if empty:
            raise ValueError(
                f"bpo.bands: data.train has no prompt in {', '.join(empty)} (of {len(rates)} prompts "
                f"{int(np.isnan(rates).sum())} have no pass rate): leave the band out, or score the data with `r4b "
                "curate score`"
            )

    def draw(self, count: int, step: int, attempt: int = 0, without: Sequence[int] = ()) -> list[int]:
        """``count`` different prompts, fewer where there are no more; a pure function of arguments and state."""
        free = ~self._dropped
        free[list(without)] = False
        wanted: dict[str, int] = {}
        if self._shares:
            points = (np.arange(count) + np.random.default_rng([self._seed, step, attempt]).random()) / count
            ends = np.cumsum(list(self._shares.values()))[:-1]
            counts = np.bincount(np.searchsorted(ends, points, "right"), minlength=len(self._shares))
            wanted = dict(zip(self._shares, counts.tolist(), strict=True))
        inside = np.zeros(len(free), bool) if self._shares else np.ones(len(free), bool)
        drawn: list[int] = []
        for name, number in wanted.items():
            members = self._members(name)
            inside |= members
            drawn += self._least_drawn(members & free, number)
            free[drawn] = False
        # What a band lacks comes from the others.
        drawn += self._least_drawn(inside & free, count - len(drawn))
        self._due[drawn] += 1
        self._seen.update(drawn)
        return drawn

    def learn(self, prompt: int, right: float, has_signal: bool) -> None:
        """What a group of rollouts showed: the share of right answers, and whether its rewards differ."""
        before = self._rates[prompt]
        self._rates[prompt] = right if np.isnan(before) else before + self._rate_update * (right - before)
        self._streak[prompt] = 0 if has_signal else self._streak[prompt] + 1
        self._due[prompt] += min(2 ** int(self._streak[prompt]) - 1, MAX_REST)
        self._seen.add(prompt)

    def drop(self, prompt: int) -> None:
        """Never draw it again."""
        self._dropped[prompt] = True
        self._seen.add(prompt)

    def rate(self, prompt: int) -> float | None:
        """The prompt's pass rate as it is held for now."""
        rate = float(self._rates[prompt])
        return None if np.isnan(rate) else rate

    @property
    def state(self) -> dict[str, list[Any]]:
        """Of every prompt that was ever drawn: pass rate, rounds, equal groups in a row, dropped."""
        columns = self._due, self._streak, self._dropped
        return {str(p): [self.rate(p), *(column[p].item() for column in columns)] for p in sorted(self._seen)}

    def restore(self, state: dict[str, list[Any]]) -> None:
        self._seen = {int(prompt) for prompt in state}
        for prompt, (rate, due, streak, dropped) in state.items():
            place = int(prompt)
            self._rates[place] = np.nan if rate is None else rate
            self._due[place], self._streak[place], self._dropped[place] = due, streak, dropped

    def _members(self, name: str) -> NDArray[np.bool_]:
        if name == UNKNOWN_BAND:
            return np.isnan(self._rates)
        return Band.parse(name).holds(self._rates)

    def _least_drawn(self, candidates: NDArray[np.bool_], count: int) -> list[int]:
        """Those with the fewest rounds, in a random order that differs from round to round (SplitMix64)."""
        places = np.flatnonzero(candidates)
        due = self._due[places]
        with np.errstate(over="ignore"):
            mixed = places.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + due.astype(np.uint64)
            mixed += np.uint64(self._seed % 2**32) * np.uint64(0xD1342543DE82EF95)
            for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
                mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        return places[np.lexsort((mixed, due))[: max(count, 0)]].tolist()
