"""Is an answer right, by rules alone? `compare` says right or wrong where that is certain, undecided where the rules
know that nobody can tell without reading the question, and None where mathematics beyond them may still decide.

Numbers. Values are compared exactly. A reference with two or more decimals stands for what rounds to it (3.14 for
3.14159 and for π); one with one decimal, or a whole number within half a per cent, leaves the answer undecided, and so
does an answer with fewer digits than the reference. Nothing else is near enough.

Units. A unit missing on one side is forgiven; two units of one dimension are converted exactly; units of different
dimensions make the answer wrong. 50% is 0.5. A reference of 50% takes 50 too, one of 0.5% leaves 0.5 undecided, and
one of 50 takes 50% where the question speaks of per cent; else that is undecided.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from r4b_core.rewards.algebra import PI, TooLarge, Unreadable, Value, read_decimal, read_value
from r4b_core.rewards.choices import compare_choices, read_options
from r4b_core.rewards.groups import Group, compare_groups, read_group
from r4b_core.rewards.text import clean
from r4b_core.rewards.units import Quantity, Unit, split_quantity
from r4b_core.rewards.verdict import Outcome, Verdict, right, undecided, wrong
from r4b_core.rewards.words import compare_bools, compare_words, is_numberish, read_number_word

MAX_CHARACTERS = 2000
_MAX_MATHEMATICS = 400

_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?")
_LITERAL = re.compile(
    r"[+-]?(?:[0-9][0-9,]*)?(?:\.([0-9]+))?(?:[eE]([+-]?[0-9]{1,4})|\s*[*x]\s*10\s*\^\s*\{?\s*([+-]?[0-9]{1,4})\s*\}?)?"
)
_TIMES_TEN = re.compile(r"(?<=[0-9])\s*x\s*(?=10\s*\^)|(?<=[0-9])\s*x\s*(?=[0-9])")
_SEVERAL_NUMBERS = re.compile(r"[+-]?[0-9][0-9.]*(?:(?:[\s,;]|or|and)+[+-]?[0-9][0-9.]*)+")
_LEAD = re.compile(
    r"(?:(?:so|thus|hence|therefore|finally|then)\b,?\s*)?"
    r"(?:(?:the\s+|my\s+|our\s+)?(?:final\s+|correct\s+|right\s+|best\s+)?(?:answer|result|value|solution|option|choice|"
    r"total|sum|length|area|volume|perimeter|height|width|angle|measure|probability|ratio|distance|number)"
    r"(?:\s+(?:of|for)\s+[^.,;:=<>]{1,40}?)?|it|this|that|there)\s*"
    r"(?:\s(?:is|are|equals|would be|will be|must be)\b|=|:)\s*(?:exactly\s|equal to\s|therefore\s|thus\s|:)?\s*",
    re.IGNORECASE,
)
_ANSWER_LABEL = re.compile(r"(?:final\s+)?(?:answer|ans|答案)\s*(?:[:=]|是|为)\s*", re.IGNORECASE)
_ABOUT = re.compile(r"(?:=|≈|~|\b(?:about|approximately|approx\.?|around|roughly|nearly)\b)\s*", re.IGNORECASE)
_NAME = re.compile(
    r"(?:[A-Za-z](?:_\{?\w{1,8}\}?)?'?|\\[a-z]{2,7}|[A-Z]{2,3}|m?\s*∠\s*\w{1,3}|[A-Za-z]\([a-z]\)|"
    r"\([a-z](?:\s*,\s*[a-z])+\)|[A-Za-z][a-z]{2,}(?: [A-Za-z]+){0,3}|∠)"
)
_RATIO = re.compile(r"([0-9.]{1,12})\s*(?::|\bto\b)\s*([0-9.]{1,12})((?:\s*:\s*[0-9.]{1,12})*)")
_CLOCK = re.compile(r"(\d{1,2})[:.](\d{2})\s*([ap])\.?\s?m\b\.?|(\d{1,2})\s*([ap])\.?m\b\.?", re.IGNORECASE)
_TIME = re.compile(r"[0-9]{1,2}:[0-5][0-9]")
_ORDINAL = re.compile(r"([0-9]+)(?:st|nd|rd|th)", re.IGNORECASE)
_FUNCTIONS = re.compile(
    r"\\[A-Za-z]+|\b(?:arc)?(?:sin|cos|tan|cot|sec|csc|log|ln|exp|lim|max|min|det|mod|gcd|lcm|pi|sqrt)\b"
)
_BARE_FUNCTION = re.compile(r"(?<![\\A-Za-z])((?:arc)?(?:sin|cos|tan|cot|sec|csc)|log|ln|exp)(?![A-Za-z])")
_WORDS = re.compile(r"[^\W\d_]{2,}(?: [^\W\d_]+)*")
_PROSE = re.compile(
    r"[^\W\d_]{3,}|[@#?\"]|[^\x00-\x7fπ∞±∪∅≤≥≠≈∈∠°√⟨⟩△→]|\b(?:an|as|at|be|by|if|in|is|it|no|of|on|or|so|to|we)\b",
    re.IGNORECASE,
)
_SAYS_NOTHING = frozenset(
    "n/a|nan|null|unknown|?|??|???|-|--|see above|see below|see image|see figure|see solution|see explanation|"
    "not available|answers may vary|answers will vary".split("|")
)
_PERCENT = re.compile(r"%|per ?cent", re.IGNORECASE)
_TOO_LARGE = "a value too large to compare"


def compare(answer: str, gold: str, question: str | None = None) -> Verdict | None:
    """The verdict on an answer, None where only mathematics beyond these rules can tell. Takes well under a second
    for any input.

    Args:
        question: for its options "A. ... B. ...", and for what kind of number it asks.
    """
    if len(answer) > 10 * MAX_CHARACTERS or len(gold) > 10 * MAX_CHARACTERS:
        return undecided(f"longer than {MAX_CHARACTERS} characters")
    if _NUMBER.fullmatch(answer) and _NUMBER.fullmatch(gold) and len(answer) <= 300 and len(gold) <= 300:
        return _plain_numbers(answer, gold)
    answer, gold = clean(answer), clean(gold)
    if not gold:
        return undecided("the reference answer is empty")
    if gold.casefold() in _SAYS_NOTHING:
        return undecided("the reference answer says nothing")
    if not answer:
        return wrong("the answer is empty")
    if answer == gold and len(gold) <= MAX_CHARACTERS:
        return right("same text")
    if len(answer) > MAX_CHARACTERS or len(gold) > MAX_CHARACTERS:
        return undecided(f"longer than {MAX_CHARACTERS} characters")
    question = question or ""
    if "_" in answer + gold and "\\" not in answer + gold and _flat(answer) == _flat(gold):
        return right("same text but for subscripts")
    rules = _Rules(question)
    answer, gold = _without_lead(answer), _without_lead(gold)
    verdict = compare_choices(answer, gold, _options(question), rules.compare)
    return verdict or rules.compare(answer, gold)


@lru_cache(256)
def _options(question: str) -> dict[str, str]:
    return {letter: clean(text) for letter, text in read_options(question).items()}


def for_mathematics(text: str) -> str:
    """The text as math-verify reads it best: functions as commands, so that sin(x) is no product."""
    return _BARE_FUNCTION.sub(r"\\\1", text)


def _without_lead(text: str) -> str:
    """Without "the answer is" and "about" in front."""
    for pattern in (_LEAD, _ANSWER_LABEL, _ABOUT):
        if (match := pattern.match(text)) and match.end() < len(text):
            text = clean(text[match.end() :])
    return text


def _plain_numbers(answer: str, gold: str) -> Verdict:
    if answer == gold:
        return right("same text")
    said, meant = (Fraction(text.replace(",", "")) for text in (answer, gold))
    if said == meant:
        return right("same number")
    return _near(said, meant, _decimals(gold), _decimals(answer))


@dataclass(frozen=True)
class _Decimals:
    """The decimals of a literal: what one unit of the last is worth, and how many there are behind the point."""

    step: Fraction
    count: int


def _decimals(text: str, factor: Fraction = Fraction(1)) -> _Decimals | None:
    """None where the text is no literal with decimals."""
    match = _LITERAL.fullmatch(text)
    if match is None or match[1] is None or len(match[1]) > 300:
        return None
    exponent = int(match[2] or match[3] or 0)
    return _Decimals(Fraction(10) ** (exponent - len(match[1])) * factor, len(match[1])) if exponent < 400 else None


def _near(said: Fraction, meant: Fraction, reference: _Decimals | None, answer: _Decimals | None) -> Verdict:
    """Numbers that differ: is one the other rounded?"""
    distance = abs(said - meant)
    if reference is not None:
        step = reference.step
        # .5 rounds up or to even; a last digit cut off instead of rounded is as near, and as unsure.
        if answer is None or answer.step < step:
            if distance * 2 < step:
                enough = reference.count >= 2
                return right("rounds to the reference") if enough else undecided("may round to the reference")
            if distance < step:
                return undecided("differs in the last digit of the reference")
    elif meant and distance * 200 <= abs(meant) and (answer is not None or said.denominator != 1):
        return undecided("close to the reference")
    if answer is not None and distance * 2 <= answer.step and said != 0:
        return undecided("may be the reference rounded")
    return wrong("another number")


class _Rules:
    """The comparison of two cleaned texts that are no choices."""

    def __init__(self, question: str) -> None:
        self._question = question
        self._percent = bool(_PERCENT.search(question))
        self._depth = 0

    def compare(self, answer: str, gold: str) -> Verdict | None:
        if answer == gold:
            return right("same text")
        self._depth += 1
        try:
            return self._compare(answer, gold) if self._depth <= 5 else undecided("nested too deeply")
        except TooLarge:
            return undecided(_TOO_LARGE)
        finally:
            self._depth -= 1

    def _compare(self, answer: str, gold: str) -> Verdict | None:
        if (verdict := compare_bools(answer, gold)) is not None:
            return verdict
        if _NUMBER.fullmatch(gold) and _SEVERAL_NUMBERS.fullmatch(answer) and not _NUMBER.fullmatch(answer):
            mixed = _read(answer)
            if mixed is None:
                return wrong("several numbers")
        if (verdict := self._clock_or_ratio(answer, gold)) is not None:
            return verdict
        if "=" in answer or "=" in gold:
            return self._equations(answer, gold)
        if (verdict := self._quantities(answer, gold) or self._parts(answer, gold)) is not None:
            return verdict
        for signs in ("≠", "<>≤≥"):
            if any(sign in answer for sign in signs) != any(sign in gold for sign in signs):
                return undecided("a relation beside no relation")
        if max(len(answer), len(gold)) > _MAX_MATHEMATICS:
            return undecided("an expression too long to compare")
        return None if _balanced(answer) and _balanced(gold) else undecided("brackets that do not close")

    def _clock_or_ratio(self, answer: str, gold: str) -> Verdict | None:
        said, meant = _CLOCK.fullmatch(answer), _CLOCK.fullmatch(gold)
        if said and meant:
            return right("same time") if _minutes(said) == _minutes(meant) else wrong("another time")
        if said or meant:
            return undecided("a time of day beside something else")
        if _TIME.fullmatch(answer) and _TIME.fullmatch(gold):
            first, second = (tuple(map(int, text.split(":"))) for text in (answer, gold))
            if first == second:
                return right("same time")
            if first[0] * second[1] != first[1] * second[0]:
                return wrong("another time or ratio")
            return right("same ratio") if "ratio" in self._question.lower() else undecided("a time or a ratio")
        ratios = _ratio(answer), _ratio(gold)
        if ratios[0] and ratios[1]:
            return right("same ratio") if ratios[0] == ratios[1] else wrong("another ratio")
        if ratios[1] and len(ratios[1]) == 2 and (value := _read(answer)) is not None:
            return right("same ratio") if value.rational == ratios[1][0] else undecided("a number beside a ratio")
        if ratios[0] and _read(gold) is not None:
            return undecided("a ratio beside a number")
        return None

    def _equations(self, answer: str, gold: str) -> Verdict | None:
        if any("=" in text and read_group(text) is not None for text in (answer, gold)):
            return self._parts(answer, gold)
        said, meant = _assignment(answer), _assignment(gold)
        if said is None or meant is None:
            return self._implicit(answer, gold)
        (name, value), (reference, wanted) = said, meant
        if name and reference and name != reference:
            alone = len(name) == len(reference) == 1
            return wrong("another variable") if alone else undecided("another name before the equals sign")
        return self.compare(value, wanted)

    def _implicit(self, answer: str, gold: str) -> Verdict | None:
        """Equations such as x² + y² = 4: the same up to a factor."""
        if answer.count("=") != 1 or gold.count("=") != 1:
            return undecided("an equation beside no equation")
        try:
            said, meant = (_difference(text) for text in (answer, gold))
        except Unreadable:
            return None if _mathematical(answer) and _mathematical(gold) else undecided("an equation in words")
        if not said.terms or not meant.terms:
            return undecided("an equation that always holds")
        key = next(iter(meant.terms))
        if key not in said.terms or said.terms.keys() != meant.terms.keys():
            return None
        factor = said.terms[key] / meant.terms[key]
        same = all(said.terms[each] == factor * meant.terms[each] for each in meant.terms)
        return right("same equation") if same else wrong("another equation")

    def _quantities(self, answer: str, gold: str) -> Verdict | None:
        """Numbers and expressions, with or without units."""
        said, meant = _quantity(answer), _quantity(gold)
        if meant is None:
            return None
        if said is None:
            if meant[1].letters or read_group(answer) is not None:
                return None
            if _WORDS.fullmatch(answer) and not is_numberish(answer):
                return wrong("words, no number")
            return None
        (quantity, value), (wanted, reference) = said, meant
        if value.letters or reference.letters:
            return self._symbolic(quantity, value, wanted, reference)
        if quantity.percent != wanted.percent:
            return self._percentages(quantity, value, wanted, reference)
        return self._units(quantity, value, wanted, reference)

    def _symbolic(self, quantity: Quantity, value: Value, wanted: Quantity, reference: Value) -> Verdict | None:
        if value.terms == reference.terms and quantity.percent == wanted.percent:
            if quantity.unit is None or wanted.unit is None or quantity.unit == wanted.unit:
                return right("same expression")
            return undecided("another unit")
        letters = value.letters | reference.letters
        if letters & {"e", "i", "j"}:
            return None
        if {name.casefold() for name in value.letters} != {name.casefold() for name in reference.letters}:
            return wrong("other variables") if value.letters and reference.letters else wrong("not the same expression")
        if value.letters != reference.letters:
            return undecided("letters of another case")
        return wrong("another expression")

    def _percentages(self, quantity: Quantity, value: Value, wanted: Quantity, reference: Value) -> Verdict:
        """One side has a percent sign, the other has none."""
        if (quantity.unit or wanted.unit) is not None:
            return undecided("per cent beside a unit")
        said, meant = value.approximate() * quantity.factor, reference.approximate() * wanted.factor
        factors = [Fraction(1, 100) if each.percent else Fraction(1) for each in (quantity, wanted)]
        as_number = said * factors[0], meant * factors[1]
        bare = meant if quantity.percent else said
        if as_number[0] == as_number[1] and not (self._percent and bare > 1):
            return right("same number as a percentage")
        if said == meant:
            clear = self._percent or (wanted.percent and abs(bare) > 1)
            return right("same percentage") if clear else undecided("per cent or not")
        verdicts = [
            _near(said, meant, _decimals(wanted.number), _decimals(quantity.number)),
            _near(*as_number, _decimals(wanted.number, factors[1]), _decimals(quantity.number, factors[0])),
        ]
        if all(verdict.outcome is Outcome.WRONG for verdict in verdicts):
            return wrong("another percentage")
        return undecided("near the percentage")

    def _units(self, quantity: Quantity, value: Value, wanted: Quantity, reference: Value) -> Verdict:
        unit, other = quantity.unit, wanted.unit
        said_scale, wanted_scale = Fraction(quantity.factor), Fraction(wanted.factor)
        if unit is not None and other is not None:
            if unit.noun or other.noun:
                if unit != other:
                    return undecided("other things counted")
            elif unit.dimension != other.dimension:
                return self._angles(value, unit, reference, other)
            else:
                said_scale, wanted_scale = said_scale * unit.scale, wanted_scale * other.scale
        elif quantity.glued or wanted.glued:
            return undecided("a unit or a variable")
        if value.times(said_scale) == reference.times(wanted_scale):
            return right("same number" if unit == other else "same quantity" if unit and other else "unit aside")
        said, meant = value.approximate() * said_scale, reference.approximate() * wanted_scale
        verdict = _near(said, meant, _decimals(wanted.number, wanted_scale), _decimals(quantity.number, said_scale))
        if verdict.outcome is Outcome.WRONG and (unit is None) != (other is None):
            return self._bare(said, unit, meant, other)
        return verdict

    def _bare(self, said: Fraction, unit: Unit | None, meant: Fraction, other: Unit | None) -> Verdict:
        """Another number, and a unit on one side only: an angle may be in radians, a length in another unit."""
        known = unit or other
        assert known is not None
        if known.dimension == (("angle", 1),):
            degrees, radians = (said, meant) if unit else (meant, said)
            return self._radians(degrees, radians)
        if not known.noun and meant and said:
            ratio = abs(said / meant)
            if ratio in _CONVERSIONS or 1 / ratio in _CONVERSIONS:
                return undecided("another unit may be meant")
        return wrong("another number")

    def _angles(self, value: Value, unit: Unit, reference: Value, other: Unit) -> Verdict:
        names = {unit.dimension, other.dimension}
        if names == {(("angle", 1),), (("radian", 1),)}:
            said, meant = value.approximate(), reference.approximate()
            return self._radians(said, meant) if unit.dimension == (("angle", 1),) else self._radians(meant, said)
        if (("unit", 1),) in names:
            return undecided("units beside a unit")
        if names in _SAME_NAME:
            return undecided("a unit of two meanings")
        return wrong("another unit")

    @staticmethod
    def _radians(degrees: Fraction, radians: Fraction) -> Verdict:
        if abs(degrees * PI / 180 - radians) < Fraction(1, 10**30):
            return right("same angle in radians")
        return wrong("another angle")

    def _parts(self, answer: str, gold: str) -> Verdict | None:
        said, meant = read_group(answer), read_group(gold)
        if (verdict := compare_groups(said, meant, self._question, self._part)) is not None:
            return verdict
        if meant is None and said is not None and (_quantity(gold) is not None or _assignment(gold)):
            return self._single(said, gold, answer)
        if said is None and meant is not None:
            return self._missing(answer, meant, gold)
        letters = len(answer) > 1 and len(gold) > 1 and answer.isalpha() and gold.isalpha()
        if _mathematical(answer) and _mathematical(gold) and not letters:
            return None
        return compare_words(answer, gold)

    def _part(self, answer: str, gold: str) -> Verdict | None:
        if len(answer) == len(gold) == 1 and answer.isalpha() and gold.isalpha():
            return right("same letter") if answer == gold else wrong("another letter")
        answer, gold = (_INFINITY.get(text, text) for text in (answer, gold))
        if answer == gold:
            return right("same part")
        if "∞" in answer or "∞" in gold:
            return wrong("another bound")
        return self.compare(answer, gold)

    def _single(self, said: Group, gold: str, answer: str) -> Verdict | None:
        if len(said.items) == 1:
            return self.compare(said.items[0], gold)
        if _mathematical(answer):
            return wrong("several answers")
        return undecided("several answers")

    def _missing(self, answer: str, meant: Group, gold: str) -> Verdict | None:
        if len(meant.items) == 1:
            return self.compare(answer, meant.items[0])
        if _quantity(answer) is not None and all(_quantity(item) or _assignment(item) for item in meant.items):
            return wrong("parts are missing")
        return None if _mathematical(answer) and _mathematical(gold) else compare_words(answer, gold)


_INFINITY = {
    "+∞": "∞",
    "inf": "∞",
    "infinity": "∞",
    "+inf": "∞",
    "-inf": "-∞",
    "-infinity": "-∞",
    "oo": "∞",
    "-oo": "-∞",
}
_SAME_NAME = ({(("mass", 1),), (("sterling", 1),)}, {(("celsius", 1),), (("current", 1), ("time", 1))})
_CONVERSIONS = frozenset(map(Fraction, (10, 12, 60, 100, 1000, 3600, 10**4, 10**6)))


def _read(text: str) -> Value | None:
    try:
        return read_value(text)
    except Unreadable:
        return None


def _quantity(text: str) -> tuple[Quantity, Value] | None:
    """Number and unit of a text; None where it is no number or expression."""
    if (value := _read(text)) is not None and (not value.letters or len(text) == 1):
        return Quantity(text), value
    if (word := read_number_word(text)) is not None:
        return Quantity(str(word)), Value({(1, ()): word} if word else {})
    if match := _ORDINAL.fullmatch(text):
        return _quantity(match[1])
    text = _TIMES_TEN.sub("*", text)
    quantity = split_quantity(text)
    if quantity is not None:
        number = clean(_ABOUT.sub("", quantity.number, count=1))
        if (found := _read(number)) is not None:
            return Quantity(number, quantity.unit, quantity.percent, quantity.factor, quantity.glued), found
    words, _, rest = text.partition(" ")
    if rest and (word := read_number_word(words)) is not None and (counted := split_quantity(f"{word} {rest}")):
        if counted.number == str(word):
            return counted, Value({(1, ()): word} if word else {})
    return None if value is None else (Quantity(text), value)


def _assignment(text: str) -> tuple[str, str] | None:
    """(name, value) of "x = 3", ("", text) without an equals sign, None for any other equation."""
    name, sign, value = text.partition("=")
    if not sign:
        return "", text
    name, value = name.strip(), value.strip()
    if "=" in value:
        first, _, last = value.rpartition("=")
        left, final = _read(first.rpartition("=")[2].strip()), _read(last.strip())
        if left is None or final is None or left.terms != final.terms:
            return None
        value = last.strip()
    if not name or not value:
        return None
    if _NAME.fullmatch(name):
        return name.replace(" ", ""), clean(_ABOUT.sub("", value, count=1)) if value[:1] in "≈~a" else value
    left, final = _read(name), _read(value)
    if left is not None and final is not None and not left.letters and left.terms == final.terms:
        return "", value
    return None


def _difference(text: str) -> Value:
    left, _, right_side = text.partition("=")
    return read_value(left.strip()) + read_value("-(" + right_side.strip() + ")")


def _ratio(text: str) -> tuple[Fraction, ...] | None:
    """The numbers of a:b:c over the last of them."""
    match = _RATIO.fullmatch(text)
    if match is None:
        return None
    try:
        numbers = [read_decimal(each) for each in (match[1], match[2], *match[3].replace(" ", "").split(":")) if each]
    except ValueError:
        return None
    return tuple(number / numbers[-1] for number in numbers) if numbers[-1] else None


def _minutes(clock: re.Match[str]) -> int:
    hour, half = int(clock[1] or clock[4]), (clock[3] or clock[5]).lower()
    return (hour % 12 + 12 * (half == "p")) * 60 + int(clock[2] or 0)


def _flat(text: str) -> str:
    return text.replace("_", "").replace("{", "").replace("}", "")


def _balanced(text: str) -> bool:
    return all(sum(map(text.count, pair[0])) == sum(map(text.count, pair[1])) for pair in (("{", "}"), ("([", ")]")))


def _mathematical(text: str) -> bool:
    """May the text be an expression, with no prose in it?"""
    return _PROSE.search(_FUNCTIONS.sub(" ", text)) is None
