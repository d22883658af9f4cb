"""Exact values of short expressions: polynomials in letters and π over sums of square roots of integers.

Two such expressions are equal exactly where their normal forms are: the square roots of distinct square-free integers
are linearly independent over the rationals, π is transcendental, letters are free. Everything is bounded, so that no
input takes long; what lies outside the bounds or the grammar is refused, not guessed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import gcd, isqrt

_MAX_CHARACTERS = 200
_MAX_DEPTH = 24
_MAX_TERMS = 64
_MAX_BITS = 4096
_MAX_RADICAND = 10**9
PI = Fraction(3141592653589793238462643383279502884197169399375105820974944, 10**60)

Letters = tuple[tuple[str, int], ...]
Key = tuple[int, Letters]
"""A term without its coefficient: (square-free radicand, letters with their exponents)."""

_TOKEN = re.compile(
    r"\s*(?:([0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]*)?|\.[0-9]+)((?<=[0-9])[eE][+-]?[0-9]+)?"
    r"|(\*\*|[-+*/^(){}\[\]])|(\\frac|\\sqrt|sqrt|√|π|pi(?![A-Za-z]))|(\\[A-Za-z]+|[A-Za-z](?:_\{?[A-Za-z0-9]+\}?)?))"
)
_WORD = re.compile(r"(?<![\\A-Za-z_])(?!pi(?![A-Za-z])|sqrt(?![A-Za-z]))[A-Za-z]{2,}")
_GREEK = frozenset("\\" + name for name in "alpha beta gamma delta theta lambda phi varphi omega rho sigma".split())


class Unreadable(Exception):
    """The text is no expression of this grammar."""


class TooLarge(Exception):
    """The expression has a value that is too large to be written out."""


@dataclass(frozen=True)
class Value:
    """A polynomial: non-zero coefficients by term."""

    terms: dict[Key, Fraction]

    @property
    def letters(self) -> frozenset[str]:
        """The free letters, π not among them."""
        return frozenset(name for _, letters in self.terms for name, _ in letters) - {"π"}

    @property
    def rational(self) -> Fraction | None:
        """The value where it is a rational number."""
        if not self.terms:
            return Fraction(0)
        return self.terms.get(_ONE) if len(self.terms) == 1 else None

    def approximate(self) -> Fraction:
        """The value of a constant to about forty digits."""
        total = Fraction(0)
        for (radicand, letters), coefficient in self.terms.items():
            root = Fraction(isqrt(radicand * 10**100), 10**50)
            total += coefficient * root * PI ** sum(exponent for _, exponent in letters)
        return total

    def times(self, factor: Fraction) -> Value:
        return self if factor == 1 else Value({key: coefficient * factor for key, coefficient in self.terms.items()})

    def __add__(self, other: Value) -> Value:
        terms = dict(self.terms)
        for key, coefficient in other.terms.items():
            terms[key] = terms.get(key, Fraction(0)) + coefficient
        return _bounded({key: coefficient for key, coefficient in terms.items() if coefficient})

    def __mul__(self, other: Value) -> Value:
        terms: dict[Key, Fraction] = {}
        for (left, letters), a in self.terms.items():
            for (right, more), b in other.terms.items():
                common = gcd(left, right)
                key = (left * right // common**2, _join(letters, more))
                terms[key] = terms.get(key, Fraction(0)) + a * b * common
        return _bounded({key: coefficient for key, coefficient in terms.items() if coefficient})

    def inverse(self) -> Value:
        """One over a single term."""
        if len(self.terms) != 1:
            raise Unreadable("division by a sum or by zero")
        ((radicand, letters), coefficient) = next(iter(self.terms.items()))
        key = (radicand, tuple((name, -exponent) for name, exponent in letters))
        return _bounded({key: 1 / (coefficient * radicand)})

    def power(self, exponent: Fraction) -> Value:
        if exponent.denominator == 2:
            return self.power(Fraction(exponent.numerator)).root()
        if exponent.denominator != 1:
            raise Unreadable("a root of higher order")
        if exponent < 0:
            return self.inverse().power(-exponent)
        size = max((_bits(c) + radicand.bit_length() for (radicand, _), c in self.terms.items()), default=0)
        if size > 1 and size * exponent > _MAX_BITS or exponent > _MAX_BITS:
            raise TooLarge
        result = constant(Fraction(1))
        for bit in bin(int(exponent))[2:]:
            result = result * result
            if bit == "1":
                result = result * self
        return result

    def root(self) -> Value:
        """The square root of a non-negative rational number."""
        square = self.rational
        if square is None or square < 0:
            raise Unreadable("a root of something else than a number")
        product = square.numerator * square.denominator
        outside, inside = _square_free(product)
        return _bounded({(inside, ()): Fraction(outside, square.denominator)}) if square else constant(square)


_ONE: Key = (1, ())


def constant(value: Fraction) -> Value:
    return Value({_ONE: value} if value else {})


@lru_cache(4096)
def read_value(text: str) -> Value:
    """The value of an expression in the notation of `text.clean`.

    Raises:
        Unreadable: outside the grammar.
        TooLarge: a power beyond any bound.
    """
    if len(text) > _MAX_CHARACTERS or _WORD.search(text):
        raise Unreadable(text[:50])
    return _Parser(text).read()


def _bits(value: Fraction) -> int:
    return max(abs(value.numerator).bit_length(), value.denominator.bit_length())


def _bounded(terms: dict[Key, Fraction]) -> Value:
    if len(terms) > _MAX_TERMS:
        raise Unreadable("too many terms")
    if any(_bits(coefficient) > 2 * _MAX_BITS or key[0] > _MAX_RADICAND**2 for key, coefficient in terms.items()):
        raise TooLarge
    return Value(terms)


def _join(left: Letters, right: Letters) -> Letters:
    if not left or not right:
        return left or right
    exponents = dict(left)
    for name, exponent in right:
        exponents[name] = exponents.get(name, 0) + exponent
    return tuple(sorted((name, exponent) for name, exponent in exponents.items() if exponent))


def _square_free(number: int) -> tuple[int, int]:
    """(a, b) with number = a² b and b square-free."""
    if (whole := isqrt(number)) ** 2 == number:
        return whole, 1
    if number > _MAX_RADICAND:
        raise Unreadable("a root of a large number")
    outside, divisor = 1, 2
    while divisor * divisor <= number:
        while number % (divisor * divisor) == 0:
            number //= divisor * divisor
            outside *= divisor
        divisor += 1
    return outside, number


class _Parser:
    """Recursive descent; a juxtaposition multiplies, but an integer before a proper fraction is a mixed number."""

    def __init__(self, text: str) -> None:
        self._tokens: list[tuple[str, str]] = []
        position, end = 0, len(text.rstrip())
        while position < end:
            match = _TOKEN.match(text, position)
            if match is None:
                raise Unreadable(text[position : position + 20])
            number, exponent, sign, command, letter = match.groups()
            if number is not None:
                self._tokens.append(("number", number.replace(",", "") + (exponent or "")))
            elif sign is not None:
                self._tokens.append(("^" if sign == "**" else sign, sign))
            elif command is not None:
                self._tokens.append(({"√": "\\sqrt", "sqrt": "\\sqrt", "pi": "π"}.get(command, command), command))
            elif letter.startswith("\\") and letter not in _GREEK:
                raise Unreadable(letter)
            else:
                self._tokens.append(("letter", letter.replace("{", "").replace("}", "")))
            position = match.end()
        self._position = self._depth = 0

    def read(self) -> Value:
        value = self._sum()
        if self._peek() is not None:
            raise Unreadable("something after the expression")
        return value

    def _peek(self, ahead: int = 0) -> str | None:
        index = self._position + ahead
        return self._tokens[index][0] if index < len(self._tokens) else None

    def _take(self, kind: str) -> str:
        if self._peek() != kind:
            raise Unreadable(f"{kind} expected")
        self._position += 1
        return self._tokens[self._position - 1][1]

    def _sum(self) -> Value:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise Unreadable("too deep")
        value = self._product()
        while self._peek() in ("+", "-"):
            minus = self._take(self._peek() or "") == "-"
            term = self._product()
            value = value + (_negative(term) if minus else term)
        self._depth -= 1
        return value

    def _product(self) -> Value:
        if self._peek() in ("+", "-"):
            minus = self._take(self._peek() or "") == "-"
            if self._peek() in ("+", "-"):
                raise Unreadable("two signs")
            value = self._product()
            return _negative(value) if minus else value
        value, divided = self._power(), False  # divided: a letter that follows may be meant to be divided by
        while (kind := self._peek()) not in (None, "+", "-", ")", "}", "]"):
            if kind == "*":
                self._take("*")
                value = value * self._signed()
            elif kind == "/":
                divided = value.rational is None or self._peek(1) != "number"
                self._take("/")
                value = value * self._signed().inverse()
            elif kind in ("number", "^", "[", "/"):
                raise Unreadable("two numbers side by side")
            elif divided:
                raise Unreadable("a/2x has two readings")
            else:
                value = value * self._power()
        return value

    def _signed(self) -> Value:
        if self._peek() == "-":
            self._take("-")
            return _negative(self._power())
        return self._power()

    def _power(self) -> Value:
        base = self._mixed()
        if base is None:
            base = self._atom()
        if self._peek() != "^":
            return base
        self._take("^")
        exponent = (self._group("{", "}") if self._peek() == "{" else self._signed()).rational
        if exponent is None:
            raise Unreadable("an exponent that is no number")
        if self._peek() == "^":
            raise Unreadable("a power of a power")
        return base.power(exponent)

    def _mixed(self) -> Value | None:
        """2 1/2 and 2\\frac{1}{2}: the integer, then a proper fraction of integers."""
        ahead = [self._peek(k) for k in range(8)]
        if ahead[:4] == ["number", "number", "/", "number"] and ahead[4] in (None, ")", "}"):
            picked = (0, 1, 3)
            length = 4
        elif ahead == ["number", "\\frac", "{", "number", "}", "{", "number", "}"]:
            picked, length = (0, 3, 6), 8
        else:
            return None
        digits = [self._tokens[self._position + k][1] for k in picked]
        if not all(each.isdigit() for each in digits) or max(map(len, digits)) > 12:
            return None
        whole, over, under = map(int, digits)
        if not 0 < over < under:
            return None
        self._position += length
        return constant(whole + Fraction(over, under))

    def _atom(self) -> Value:
        kind = self._peek()
        if kind == "number":
            return constant(read_decimal(self._take("number")))
        if kind in ("letter", "π"):
            name = self._take(kind)
            return Value({(1, (("π" if kind == "π" else name, 1),)): Fraction(1)})
        if kind == "(":
            return self._group("(", ")")
        if kind == "{":
            return self._group("{", "}")
        if kind == "\\frac":
            self._take("\\frac")
            over = self._argument()
            return over * self._argument().inverse()
        if kind == "\\sqrt":
            digits_apart = self._take("\\sqrt").startswith("\\")
            if self._peek() == "[":
                self._take("[")
                if self._take("number") != "2":
                    raise Unreadable("a root of higher order")
                self._take("]")
            return (self._argument() if digits_apart else self._atom()).root()
        raise Unreadable(f"{kind} where a value belongs")

    def _group(self, begin: str, end: str) -> Value:
        self._take(begin)
        value = self._sum()
        self._take(end)
        return value

    def _argument(self) -> Value:
        """What follows \\frac or \\sqrt: a group, or the single digits of \\frac12."""
        kind, digits = self._tokens[self._position] if self._peek() else ("", "")
        if kind == "number" and len(digits) > 1 and digits.isdigit():
            self._tokens[self._position : self._position + 1] = [("number", digit) for digit in digits]
        return self._atom()


def _negative(value: Value) -> Value:
    return value.times(Fraction(-1))


def read_decimal(digits: str) -> Fraction:
    """A decimal, with or without an exponent.

    Raises:
        TooLarge: if it has more digits than anything worth comparing.
    """
    mantissa, _, exponent = digits.lower().partition("e")
    if len(mantissa) > 1000 or len(exponent) > 5 or abs(int(exponent or 0)) > 1000:
        raise TooLarge
    return Fraction(digits)
