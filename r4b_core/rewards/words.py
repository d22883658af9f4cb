"""Answers in words: yes and no, number words, negations, and classes of words of which only one can be meant."""

from __future__ import annotations

import re
from fractions import Fraction

from r4b_core.rewards.verdict import Verdict, right, undecided, wrong

_YES = frozenset("yes|true|yeah|yep|是|是的|对|对的|正确".split("|"))
_NO = frozenset("no|false|nope|不|不是|否|错|错误|不对|不正确".split("|"))
_REST = re.compile(r"(?P<word>\w+)\s*[,.;:]\s*(?P<rest>.+)", re.DOTALL)
_DOUBT = re.compile(
    r"\b(?:not|no|never|neither|nor|but|however|actually|wait|unless|or|false|true|yes|maybe|perhaps|cannot|instead|"
    r"incorrect|wrong)\b|n't\b",
    re.IGNORECASE,
)
_BACK = re.compile(r"\b(?:but|however|actually|wait|unless|or|true|yes|maybe|perhaps|instead)\b", re.IGNORECASE)
_NEGATION = frozenset("not no never non neither nor isn't aren't doesn't don't without cannot can't un".split())
_ARTICLES = frozenset("a an the".split())
_WORD = re.compile(r"[^\W_]+(?:'[a-z]+)?")
_CLASSES = [
    frozenset(words.split())
    for words in (
        "red orange yellow green blue purple violet pink brown black white gray grey cyan magenta silver gold beige",
        "north south east west northeast northwest southeast southwest",
        "left right", "up down", "above below", "top bottom", "inside outside", "front back",
        "monday tuesday wednesday thursday friday saturday sunday",
        "january february march april may june july august september october november december",
        "increase decrease", "increases decreases", "increasing decreasing constant", "higher lower", "more less same",
        "greater less equal", "larger smaller equal", "positive negative zero", "odd even", "acute obtuse right",
        "horizontal vertical", "clockwise counterclockwise anticlockwise", "male female", "hot cold", "day night",
        "parallel perpendicular", "concave convex", "solid liquid gas plasma", "maximum minimum", "rational irrational",
        "circle triangle square rectangle pentagon hexagon octagon trapezoid rhombus ellipse star",
        "sphere cube cone cylinder pyramid prism", "linear quadratic cubic exponential logarithmic",
        "equilateral isosceles scalene", "oxygen nitrogen hydrogen carbon helium", "first second third fourth fifth",
    )
]  # fmt: skip
_SYNONYMS = {"grey": "gray", "anticlockwise": "counterclockwise", "violet": "purple"}
_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
)
_SMALL = {word: number for number, word in enumerate([*_UNITS.split(), "eighteen", "nineteen"])}
_TENS = {
    word: 10 * number
    for number, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), start=2)
}
_PARTS = {"half": 2, "halves": 2, "third": 3, "thirds": 3, "quarter": 4, "quarters": 4, "fourth": 4, "fourths": 4}
_CHINESE = {sign: number for number, sign in enumerate("零一二三四五六七八九")} | {"两": 2, "〇": 0}
_CHINESE_TENS = {"十": 10, "百": 100, "千": 1000}
_NUMBERISH = re.compile(
    r"[0-9∞π]|\b(?:half|twice|double|triple|infinit\w*|none|nothing|dozen|single|both|pair|once|first|second|third|"
    r"\w+th|hundred|thousand|million|all|quarter)\b",
    re.IGNORECASE,
)


def read_bool(text: str) -> bool | None:
    """True for yes, False for no, None for anything else; "yes, because ..." counts unless something follows that
    may take it back."""
    folded = text.casefold()
    if folded in _YES or folded in _NO:
        return folded in _YES
    match = _REST.fullmatch(folded)
    if match is None or match["word"] not in _YES | _NO:
        return None
    # A "no" may go on with negations; a "yes" that does may be taking itself back.
    if (_DOUBT if match["word"] in _YES else _BACK).search(match["rest"]):
        return None
    return match["word"] in _YES


def compare_bools(answer: str, gold: str) -> Verdict | None:
    """The verdict where the reference is yes, no, true or false."""
    meant = read_bool(gold)
    if meant is None or len(gold) > 8:
        return None
    said = read_bool(answer)
    if said is None:
        return undecided("neither yes nor no")
    return right("same yes or no") if said == meant else wrong("the other of yes and no")


def read_number_word(text: str) -> Fraction | None:
    """The number that words say: seven, twenty-five, one hundred, one half, 二十五."""
    if not text or len(text) > 40:
        return None
    if all(sign in _CHINESE or sign in _CHINESE_TENS for sign in text):
        return _chinese(text)
    words = text.casefold().replace("-", " ").replace(" and ", " ").split()
    negative = words[:1] in (["minus"], ["negative"])
    words = words[negative:]
    if not words or not all(
        w in _SMALL or w in _TENS or w in ("hundred", "thousand", "a") or w in _PARTS for w in words
    ):
        return None
    if words[-1] in _PARTS:
        over = _cardinal(words[:-1]) if words[:-1] not in ([], ["a"]) else 1
        value = None if over is None or over >= _PARTS[words[-1]] * 4 else Fraction(over, _PARTS[words[-1]])
        value = None if value is not None and len(words) == 1 and words[0] != "half" else value
    else:
        whole = _cardinal(words)
        value = None if whole is None else Fraction(whole)
    return -value if value is not None and negative else value


def _cardinal(words: list[str]) -> int | None:
    total = current = 0
    last = 10**9
    for word in words:
        if word in ("hundred", "thousand"):
            size = 100 if word == "hundred" else 1000
            current = max(current, 1) * size
            if size == 1000:
                total, current = total + current, 0
            last = size
        else:
            value = 1 if word == "a" else _SMALL[word] if word in _SMALL else _TENS.get(word, -1)
            if value < 0 or (last < 20) or (last < 100 and value > 9):
                return None
            current += value
            last = value if value >= 20 else 1
    return total + current


def _chinese(text: str) -> Fraction | None:
    total, digit, tens = 0, 0, 10**4
    for sign in text:
        if sign in _CHINESE:
            if digit:
                return None
            digit = _CHINESE[sign]
        elif _CHINESE_TENS[sign] >= tens:
            return None
        else:
            tens = _CHINESE_TENS[sign]
            total, digit = total + max(digit, 1) * tens, 0
    return Fraction(total + digit)


def is_numberish(text: str) -> bool:
    """May the words speak of a number?"""
    return bool(_NUMBERISH.search(text)) or any(word in _SMALL or word in _TENS for word in _plain(text))


def compare_words(answer: str, gold: str) -> Verdict:
    """The verdict on two texts: the same words are right, a negation or the other word of a class is wrong."""
    said, meant = _plain(answer), _plain(gold)
    if not meant or not said:
        return undecided("signs that cannot be compared")
    if _signs(answer) != _signs(gold):
        return undecided("other signs")
    if "".join(said) == "".join(meant):
        return right("same words")
    without = [word for word in said if word not in _NEGATION]
    if without == [word for word in meant if word not in _NEGATION]:
        return wrong("negated")
    if len(said) == len(meant):
        pairs = [(a, b) for a, b in zip(said, meant, strict=True) if a != b]
        if len(pairs) == 1 and any(set(pairs[0]) <= words for words in _CLASSES):
            return wrong("another word of its class")
    return undecided("other words")


def _plain(text: str) -> list[str]:
    words = _WORD.findall(text.casefold())
    return [_SYNONYMS.get(word, word) for word in words if word not in _ARTICLES or len(words) == 1]


def _signs(text: str) -> list[str]:
    """Signs that change a meaning, unlike a comma, a stop or a hyphen between letters."""
    return re.findall(r"[+*/^=<>≤≥≠%°$]|(?<![^\W\d_])-(?=\w)", text)
