"""Units of measure: their spelling, their dimension and the exact factor to the base unit of that dimension."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

Dimension = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Unit:
    """A known unit, or the noun that was counted (``scale`` 1, its own dimension).

    Attributes:
        scale: how many base units one of these is.
        dimension: exponents of the base quantities, sorted; a temperature scale or a currency is one of its own.
        noun: True where it is no unit of the table.
    """

    scale: Fraction
    dimension: Dimension
    noun: bool = False


def _table() -> dict[str, tuple[Fraction, dict[str, int]]]:
    table: dict[str, tuple[Fraction, dict[str, int]]] = {}

    def add(names: str, scale: str | Fraction, **dimension: int) -> None:
        for name in names.split("|"):
            table[name] = (Fraction(scale), dimension)

    prefixes = (("", "", "1"), ("k", "kilo", "1000"), ("m", "milli", "1/1000"), ("c", "centi", "1/100"))
    more = (("µ", "micro", "1/1000000"), ("n", "nano", "1/1000000000"), ("M", "mega", "1000000"))
    force = {"mass": 1, "length": 1, "time": -2}
    energy = {"mass": 1, "length": 2, "time": -2}
    power = {"mass": 1, "length": 2, "time": -3}
    metric: tuple[tuple[str, str, str, dict[str, int]], ...] = (
        ("m", "metre|meter", "1", {"length": 1}),
        ("g", "gram", "1/1000", {"mass": 1}),
        ("s", "second", "1", {"time": 1}),
        ("L", "liter|litre", "1/1000", {"length": 3}),
        ("N", "newton", "1", force),
        ("J", "joule", "1", energy),
        ("W", "watt", "1", power),
        ("Pa", "pascal", "1", {"mass": 1, "length": -1, "time": -2}),
        ("V", "volt", "1", {**power, "current": -1}),
        ("A", "ampere|amp", "1", {"current": 1}),
        ("Ω", "ohm", "1", {**power, "current": -2}),
        ("C", "coulomb", "1", {"current": 1, "time": 1}),
        ("F", "farad", "1", {"mass": -1, "length": -2, "time": 4, "current": 2}),
        ("T", "tesla", "1", {"mass": 1, "time": -2, "current": -1}),
        ("Hz", "hertz", "1", {"time": -1}),
        ("mol", "mole", "1", {"amount": 1}),
        ("eV", "electronvolt", "801088317/5000000000000000000000000000", energy),
    )
    for symbol, names, scale, dimension in metric:
        for short, long, factor in prefixes + more:
            add(short + symbol, Fraction(scale) * Fraction(factor), **dimension)
            for name in names.split("|"):
                add(f"{long}{name}|{long}{name}s", Fraction(scale) * Fraction(factor), **dimension)
    add("l", "1/1000", length=3)
    add("ml", "1/1000000", length=3)
    add("cl", "1/100000", length=3)
    add("sec|secs", "1", time=1)
    add("min|mins|minute|minutes", "60", time=1)
    add("h|hr|hrs|hour|hours", "3600", time=1)
    add("day|days", "86400", time=1)
    add("week|weeks", "604800", time=1)
    add("month|months", "1", months=1)
    add("year|years|yr|yrs", "12", months=1)
    add("in|inch|inches", "127/5000", length=1)
    add("ft|foot|feet", "381/1250", length=1)
    add("yd|yard|yards", "1143/1250", length=1)
    add("mi|mile|miles", "201168/125", length=1)
    add("lb|lbs|pound|pounds", "45359237/100000000", mass=1)
    add("oz|ounce|ounces", "45359237/1600000000", mass=1)
    add("tonne|tonnes", "1000", mass=1)
    add("ha|hectare|hectares", "10000", length=2)
    add("mph", "1397/3125", length=1, time=-1)
    add("kph|kmh", "5/18", length=1, time=-1)
    add("atm", "101325", mass=1, length=-1, time=-2)
    add("K|kelvin|kelvins", "1", kelvin=1)
    add("°C|celsius", "1", celsius=1)
    add("°F|fahrenheit", "1", fahrenheit=1)
    add("°|deg|degs|degree|degrees", "1", angle=1)
    add("$|dollar|dollars|usd|USD", "1", dollar=1)
    add("cent|cents|¢", "1/100", dollar=1)
    add("€|euro|euros|EUR", "1", euro=1)
    add("£|GBP|pound sterling|pounds sterling", "1", sterling=1)
    add("¥|yuan|RMB|CNY", "1", yuan=1)
    add("₹|rupee|rupees|Rs", "1", rupee=1)
    add("rad|rads|radian|radians", "1", radian=1)
    add("unit|units", "1", unit=1)
    return table


_UNITS = _table()
_FOLDED = {name.casefold(): unit for name, unit in _UNITS.items() if len(name) > 3}
_MULTIPLIERS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_PIECE = re.compile(r"([A-Za-zµΩ°$€£¥¢₹]+)\s*(?:\^\s*\{?\s*(-?[0-9]{1,2})\s*\}?|([23])(?![0-9]))?")
_SPLIT = re.compile(r"\s*(/|\bper\b|[*·]|\s)\s*")
_START = re.compile(r"(?<![\\A-Za-z])(?!(?:pi|sqrt|x|e[+-]?[0-9]|E[+-]?[0-9])(?![A-Za-z]))[A-Za-zµΩ°%€£¥¢₹]")
_COUNTED = re.compile(r"[A-Za-z]{3,}(?:[ -][A-Za-z]{2,}){0,2}")
_MONEY = re.compile(r"([+-]?)\s*(US\$|[$€£¥₹])\s*(?=[0-9.])")
_NO_NOUN = frozenset(
    "or and not no nor but except either neither about than less more over under minus plus times divided per half "
    "halves third thirds quarter quarters fourth fourths fifth fifths tenth tenths hundredth hundredths squared cubed "
    "root power factorial mod modulo percent point negative positive dozen dozens pair pairs score if when is are was "
    "because since so to from between with without remainder sin cos tan log ratio out of hundreds thousands millions "
    "billions double twice triple thrice approximately instead rather maybe possibly actually wrong incorrect".split()
)


@lru_cache(1024)
def read_unit(text: str) -> Unit | None:
    """The unit that a text spells, None where it is no text of a unit."""
    text = text.strip()
    if found := _UNITS.get(text) or _FOLDED.get(text.casefold()):
        return Unit(found[0], tuple(sorted(found[1].items())))
    if (compound := _compound(text)) is not None:
        return compound
    if _COUNTED.fullmatch(text) and not _NO_NOUN & set(re.split("[ -]", text.casefold())):
        return Unit(Fraction(1), ((_singular(text.casefold()), 1),), noun=True)
    return None


def _compound(text: str) -> Unit | None:
    """Products, quotients and powers, and "square", "cubic", "squared" in words."""
    words = re.sub(r"\bsq\.?\s+|\bsquared?\s+(?=[A-Za-z])", "square ", text, flags=re.IGNORECASE)
    words = re.sub(r"\bcu\.?\s+", "cubic ", words, flags=re.IGNORECASE).replace("(", "").replace(")", "")
    scale, dimension, sign, power = Fraction(1), dict[str, int](), 1, 1
    pieces = [piece for piece in _SPLIT.split(words) if piece and not piece.isspace()]
    if not pieces or len(pieces) > 9:
        return None
    for piece in pieces:
        if piece in ("/", "per"):
            sign = -1
        elif piece in ("*", "·"):
            continue
        elif piece.casefold() in ("square", "cubic"):
            power = 2 if piece.casefold() == "square" else 3
        elif piece in ("squared", "cubed"):
            return None
        else:
            match = _PIECE.fullmatch(piece)
            found = match and (_UNITS.get(match[1]) or _FOLDED.get(match[1].casefold()))
            if match is None or not found:
                return None
            exponent = sign * power * int(match[2] or match[3] or 1)
            scale *= found[0] ** exponent
            for name, each in found[1].items():
                dimension[name] = dimension.get(name, 0) + each * exponent
            sign = power = 1
    if power != 1:
        return None
    return Unit(scale, tuple(sorted((name, each) for name, each in dimension.items() if each)))


def _singular(noun: str) -> str:
    return noun.removesuffix("s") if not noun.endswith("ss") else noun


@dataclass(frozen=True)
class Quantity:
    """A number as text with what stands beside it.

    Attributes:
        number: text of the number.
        unit: what it counts, None for a bare number.
        percent: True where a percent sign follows.
        factor: 10 to the power that a word such as "million" adds.
        glued: True where a unit of one letter touches the number, as in "5m", which may be a product.
    """

    number: str
    unit: Unit | None = None
    percent: bool = False
    factor: int = 1
    glued: bool = False


def split_quantity(text: str) -> Quantity | None:
    """Number and unit of a text in the notation of `text.clean`; None where no unit can be read."""
    if money := _MONEY.match(text):
        unit = read_unit(money[2].removeprefix("US"))
        inner = split_quantity(text[money.end() :])
        if inner is None or (inner.unit is not None and inner.unit != unit):
            return None
        return Quantity(money[1] + inner.number, unit, inner.percent, inner.factor)
    start = _START.search(text)
    if start is None:
        number, _, rest = text.partition("$")
        return Quantity(text) if not rest and text == number else _suffixed(number, "$" + rest)
    return _suffixed(text[: start.start()], text[start.start() :])


def _suffixed(number: str, rest: str) -> Quantity | None:
    glued = len(rest) == 1 and rest.isalpha() and number[-1:] != " "
    number = number.strip()
    if not number or number[-1] in "+-*/^({[,_":
        return None
    factor = 1
    word, _, after = rest.partition(" ")
    if word.casefold() in _MULTIPLIERS:
        factor, rest = 10 ** _MULTIPLIERS[word.casefold()], after.strip()
        if not rest:
            return Quantity(number, None, False, factor)
    if rest in ("%", "percent", "per cent", "percents", "% percent"):
        return Quantity(number, None, True, factor)
    unit = read_unit(rest)
    return None if unit is None else Quantity(number, unit, False, factor, glued)
