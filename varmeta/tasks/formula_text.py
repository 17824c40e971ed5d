"""A formula's text taken apart: its response, fixed terms, offsets, and what varies by which group.

Only what lies between the terms is read here; each term's own text is read by formulae.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

OPENING, CLOSING, QUOTES = "([{", ")]}", "'\"`"


@dataclass(frozen=True)
class Varying:
    """One term `(terms | group)`.

    terms: what stands left of the bar.  correlated: whether the bar is single.
    """

    terms: str
    correlated: bool


@dataclass(frozen=True)
class FormulaText:
    """The parts of `response ~ fixed + offset(...) + (terms | group)`.

    fixed: the fixed terms, "1" where none are written.
    group: the columns whose values together name a row's task.
    """

    response: str
    fixed: str
    offsets: tuple[str, ...]
    varying: tuple[Varying, ...]
    group: tuple[str, ...]


def read_formula(formula: str) -> FormulaText:
    """The parts of a formula.

    Raises TypeError for what is no text; ValueError for one without a response or a term that
    varies, and for more than one grouping factor.

    >>> found = read_formula("y ~ x + f + (x || school)")
    >>> found.fixed, found.varying, found.group
    ('x + f', (Varying(terms='x', correlated=False),), ('school',))
    """
    if not isinstance(formula, str):
        raise TypeError(
            f"a formula is a text such as 'y ~ x + (x | group)', not a {type(formula).__name__}"
        )
    sides = [part.strip() for _, part in _split(formula, ("~",))]
    if len(sides) != 2 or not all(sides):
        raise ValueError(f"{formula!r} is no formula with a response: write 'y ~ x + (x | group)'")
    fixed, offsets, varying = "", list[str](), list[tuple[Varying, str]]()
    for sign, term in _split(sides[1], ("+", "-")):
        term = term.strip()
        found = _varying(term, formula)
        if found is not None:
            if sign == "-":
                raise ValueError(f"{formula!r} takes {term} away: leave it out instead")
            varying.append(found)
        elif sign != "-" and re.fullmatch(r"offset\s*\(.*\)", term, re.DOTALL):
            offsets.append(term)
        elif term:
            fixed += f" {sign} {term}" if fixed or sign == "-" else term
    if not varying:
        raise ValueError(
            f"{formula!r} has no term that varies, such as (1 | group) for an intercept of each "
            "group's own: varmeta learns from many groups how they differ"
        )
    group = _one_group([by for _, by in varying], formula)
    fixed = f"1 {fixed.strip()}" if fixed.strip().startswith("-") else fixed or "1"
    return FormulaText(sides[0], fixed, tuple(offsets), tuple(term for term, _ in varying), group)


def _varying(term: str, formula: str) -> tuple[Varying, str] | None:
    """The term and its grouping factor; None of a fixed one."""
    inside = _in_brackets(term)
    parts = [] if inside is None else list(_split(inside, ("||", "|")))
    if len(parts) == 2:
        (_, terms), (bar, by) = parts
        if terms.strip() and by.strip():
            return Varying(terms.strip(), bar == "|"), by.strip()
    if any(char == "|" for char, _ in _outside_quotes(term)):
        raise ValueError(
            f"{term!r} in {formula!r} is no term that varies: write each as (terms | group), in "
            "brackets and by itself"
        )
    return None


def _one_group(groups: list[str], formula: str) -> tuple[str, ...]:
    """The columns of the grouping factor that all of them name."""
    found: list[frozenset[str]] = []
    first: tuple[str, ...] = ()
    for by in groups:
        parts = [part.strip() for _, part in _split(by, (":", "/", "*", "+"))]
        names = tuple(part.strip("`") for part in parts)
        if not all(re.fullmatch(r"[^\W\d][\w.]*|`[^`]+`", part) for part in parts):
            raise ValueError(
                f"the groups {by!r} in {formula!r} are no column: make a column of them first "
                "(a:b joins two)"
            )
        joined = {sign for sign, _ in _split(by, (":", "/", "*", "+"))}
        levels = [names]
        if "/" in joined:
            levels = [names[: end + 1] for end in range(len(names))]
        elif joined & {"*", "+"}:
            levels = [(name,) for name in names]
        found += [frozenset(level) for level in levels]
        first = first or names
    if len(set(found)) == 1:
        return first
    nested = all(a <= b or b <= a for a in found for b in found)
    several = ", ".join(dict.fromkeys(":".join(sorted(names)) for names in found))
    raise ValueError(
        f"{formula!r} has several grouping factors, {several}, which are "
        f"{'nested' if nested else 'crossed'}; here there is one, the tasks.  Keep that whose "
        "groups are to be learned from and adapted to; another with few levels can stand among "
        "the fixed effects (+ h) or, within the groups, vary with them: (0 + h | g).  For both at "
        "once use lme4, brms or bambi"
    )


def _in_brackets(term: str) -> str | None:
    """What is in the brackets that are the whole term."""
    if not term.startswith("("):
        return None
    closes = [i for i, (char, depth) in enumerate(_walk(term)) if char == ")" and depth == 0]
    return term[1:-1] if closes and closes[0] == len(term) - 1 else None


def _walk(text: str) -> Iterator[tuple[str, int]]:
    """Every character and how deep it is in brackets; those in quotes are 1,000 deep.

    An opening bracket is as deep as what is in it, a closing one as what is around it.
    """
    depth, quote = 0, ""
    for char in text:
        if quote:
            yield char, 1000
            quote = "" if char == quote else quote
            continue
        if char in QUOTES:
            quote = char
            yield char, 1000
            continue
        depth += (char in OPENING) - (char in CLOSING)
        yield char, depth


def _outside_quotes(text: str) -> Iterator[tuple[str, int]]:
    return ((char, depth) for char, depth in _walk(text) if depth < 1000)


def _split(text: str, signs: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """The parts between signs outside all brackets and quotes, each with the sign before it."""
    depths = [depth for _, depth in _walk(text)]
    begin, sign, at = 0, "", 0
    while at < len(text):
        found = next((one for one in signs if text.startswith(one, at)), None)
        # a power is no product
        if found == "*" and text.startswith("**", at):
            found, at = None, at + 1
        if found is None or depths[at]:
            at += 1
            continue
        yield sign, text[begin:at]
        sign, begin, at = found, at + len(found), at + len(found)
    yield sign, text[begin:]
