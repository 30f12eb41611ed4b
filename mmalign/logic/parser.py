"""Reading first-order logic: recursive descent with precedence, and errors that say where."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from mmalign.errors import MmalignError
from mmalign.logic.formula import (
    EQUALS,
    KEYWORDS,
    OPERATORS,
    PRECEDENCE,
    QUANTIFIERS,
    RIGHT_ASSOCIATIVE,
    Atom,
    Binary,
    Formula,
    Not,
    Quantified,
    Term,
    is_keyword,
    quantifiers,
)

MAX_LENGTH = 4000
"""Longest text that is read, in characters."""
MAX_DEPTH = 64
"""Deepest nesting of brackets, operators, quantifiers and functions."""


class FormulaError(MmalignError, ValueError):
    """Text that is no formula: what is wrong, and the ``position`` (characters from the start) where it is."""

    def __init__(self, problem: str, text: str, position: int) -> None:
        super().__init__(f"{problem}, at character {position} of {_excerpt(text, position)}")
        self.problem, self.text, self.position = problem, text, position


def _excerpt(text: str, position: int) -> str:
    """``text`` quoted, or the part of it around ``position``, which is marked."""
    start, end = max(0, position - 40), position + 40
    left = ("…" if start else "") + text[start:position]
    right = text[position:end] + ("…" if end < len(text) else "")
    return repr(f"{left}⟪here⟫{right}" if text else text)


@dataclass(frozen=True, slots=True)
class Token:
    """A symbol, bracket, comma, name or number of a formula."""

    kind: str
    """The symbol itself (in its usual spelling), or "name", "number", "end"."""
    value: str
    position: int


_SPELLINGS: tuple[tuple[str, str], ...] = (
    ("<->", "↔"), ("<=>", "↔"), ("<-->", "↔"), ("⇔", "↔"), ("⟷", "↔"), ("≡", "↔"), ("->", "→"), ("-->", "→"), ("=>", "→"),
    ("==>", "→"), ("⇒", "→"), ("⟶", "→"), ("⊃", "→"), ("&&", "∧"), ("&", "∧"), ("/\\", "∧"), ("||", "∨"), ("|", "∨"),
    ("\\/", "∨"), ("^", "⊕"), ("⊻", "⊕"), ("~", "¬"), ("!=", "≠"), ("!", "¬"), ("=", "="), ("[", "("), ("]", ")"),
    (r"\forall", "∀"), (r"\exists", "∃"), (r"\neg", "¬"), (r"\lnot", "¬"), (r"\land", "∧"), (r"\wedge", "∧"), (r"\lor", "∨"),
    (r"\vee", "∨"), (r"\oplus", "⊕"), (r"\rightarrow", "→"), (r"\to", "→"), (r"\implies", "→"), (r"\leftrightarrow", "↔"),
    (r"\iff", "↔"), *((symbol, symbol) for symbol in "∀∃¬∧∨⊕→↔≠(),.:"),
)
_MEANING = dict(_SPELLINGS)
_SYMBOL = re.compile("|".join(
    re.escape(spelling) + (r"(?![A-Za-z])" if spelling[-1].isascii() and spelling[-1].isalpha() else "")
    for spelling in sorted(_MEANING, key=len, reverse=True)))
_NUMBER = re.compile(r"\d+(?:\.\d+)?(?!\w)")
_WORD = re.compile(r"[^\W\d]\w*")
_SPACE = re.compile(r"\s+")


def tokenize(text: str, *, compat: bool = False) -> list[Token]:
    """Tokens of ``text``, symbols in their usual spelling; raises FormulaError for characters that belong to none.

    ``compat``: names as the tokeniser of the published code makes them, see :func:`parse`.
    """
    if len(text) > MAX_LENGTH:
        raise FormulaError(f"the text has {len(text)} characters, more than the {MAX_LENGTH} that are read", text, MAX_LENGTH)
    tokens: list[Token] = []
    at = 0
    while at < len(text):
        if space := _SPACE.match(text, at):
            at = space.end()
            continue
        symbol = _SYMBOL.match(text, at)
        if symbol:
            tokens.append(Token(_MEANING[symbol[0]], _MEANING[symbol[0]], at))
        elif (symbol := _NUMBER.match(text, at)) is not None:
            tokens.append(Token("number", symbol[0], at))
        elif (symbol := _WORD.match(text, at)) is not None:
            word = symbol[0]
            if is_keyword(word) and not compat:
                meaning = KEYWORDS[word.lower()]
                tokens.append(Token(meaning, meaning, at))
            elif compat and tokens and tokens[-1].kind in QUANTIFIERS and len(word) > 1:
                tokens += [Token("name", word[0], at), Token("name", word[1:], at + 1)]
            else:
                tokens.append(Token("name", word, at))
        else:
            raise FormulaError(f"unexpected {text[at]!r}", text, at)
        at = symbol.end()
    return _joined(tokens, text) if compat else tokens


def _joined(tokens: list[Token], text: str) -> list[Token]:
    """Names that only spaces separate become one, every longer one with a capital first letter (``dc universe``: DcUniverse)."""
    result: list[Token] = []
    for index, token in enumerate(tokens):
        if token.kind not in ("name", "number"):
            result.append(token)
            continue
        variable = index > 0 and tokens[index - 1].kind in QUANTIFIERS
        after_variable = index > 1 and tokens[index - 2].kind in QUANTIFIERS
        word = token.value if variable or len(token.value) == 1 else token.value[0].upper() + token.value[1:]
        joins = result and result[-1].kind == "name" and not variable and not after_variable
        if joins:
            before = result.pop()
            first = before.value[0].upper() + before.value[1:]
            token = Token("name", first + word, before.position)
        else:
            token = Token(token.kind, word, token.position)
        result.append(token)
    return result


def parse(text: str, *, compat: bool = False) -> Formula:
    """The formula that ``text`` writes.

    Negation binds tightest, then ∧, ∨, ⊕, → (grouping to the right) and ↔; a quantifier reaches as far to the right as it
    can. Symbols may be written in ASCII (``forall x (P(x) -> ~Q(x))``), as words (``not``, ``and``, ...) or in LaTeX; ``∀x,y`` is
    short for ``∀x ∀y``, and a ``.`` or ``:`` may follow a variable.

    ``compat`` accepts what the parser of LogicLLaMA's published code does (Yang et al. 2023, arXiv 2305.15541): Unicode symbols,
    predicates of at least one plain term, one-letter variables, no quantifier under a negation. It reads names as that code's
    tokeniser does, and like it moves all quantifiers to the front, which changes the meaning of nested ones.

    Raises FormulaError, and nothing else, for text that is no formula, empty, longer than ``MAX_LENGTH`` or nested deeper than
    ``MAX_DEPTH``.
    """
    return _parse(text, compat)


@lru_cache(maxsize=8192)
def _parse(text: str, compat: bool) -> Formula:
    parser = _Parser(text, compat)
    formula = parser.whole()
    return _to_front(formula) if compat else formula


class _Parser:
    """One pass over the tokens; every method returns a formula and its depth."""

    def __init__(self, text: str, compat: bool) -> None:
        self.text, self.compat = text, compat
        self.tokens = tokenize(text, compat=compat)
        if compat:
            self._check_spelling()
        self.tokens.append(Token("end", "the end", len(text)))
        self.at = 0

    @property
    def next(self) -> Token:
        return self.tokens[self.at]

    def error(self, problem: str, token: Token | None = None) -> FormulaError:
        return FormulaError(problem, self.text, (token or self.next).position)

    def take(self, kind: str, wanted: str) -> Token:
        token = self.next
        if token.kind != kind:
            raise self.error(f"expected {wanted}, found {token.value!r}" if token.kind != "end" else
                             f"expected {wanted}, but the text ends")
        self.at += 1
        return token

    def whole(self) -> Formula:
        if self.next.kind == "end":
            raise self.error("the text holds no formula")
        formula, _ = self.expression(0, 1)
        if self.next.kind != "end":
            unbalanced = " without an opening one" if self.next.kind == ")" else ""
            raise self.error(f"expected an operator or the end, found {self.next.value!r}{unbalanced}")
        return formula

    def expression(self, minimum: int, level: int) -> tuple[Formula, int]:
        """Operands joined by operators that bind at least as strongly as ``minimum``."""
        self._limit(level)
        left, depth = self.operand(level)
        while self.next.kind in OPERATORS and PRECEDENCE[self.next.kind] >= minimum:
            operator = self.next.kind
            self.at += 1
            right, other = self.expression(PRECEDENCE[operator] + (operator not in RIGHT_ASSOCIATIVE), level + 1)
            left, depth = Binary(operator, left, right), max(depth, other) + 1  # type: ignore[arg-type]
            self._limit(depth)
        return left, depth

    def operand(self, level: int) -> tuple[Formula, int]:
        """Negations, quantifiers, brackets and atoms."""
        self._limit(level)
        token = self.next
        if token.kind == "¬":
            self.at += 1
            body, depth = self.operand(level + 1)
            self._limit(depth + 1)
            if self.compat and quantifiers(body):
                raise self.error("a quantifier under a negation, which compat does not read", token)
            return Not(body), depth + 1
        if token.kind in QUANTIFIERS:
            return self.quantified(level)
        if token.kind == "(":
            self.at += 1
            found = self.expression(0, level + 1)
            self.take(")", "a closing bracket")
            return found
        return self.atom(level), 1

    def quantified(self, level: int) -> tuple[Formula, int]:
        quantifier = self.next.kind
        self.at += 1
        variables = [self.variable()]
        while self.next.kind == "," and not self.compat:
            self.at += 1
            variables.append(self.variable())
        if self.next.kind in (".", ":"):
            self.at += 1
        elif self._lone_name():
            raise self.error(f"the variable {variables[-1]!r} is followed by a name in brackets; put a space between a variable "
                             "and its predicate")
        body, depth = self.expression(0, level + len(variables))
        for variable in reversed(variables):
            body, depth = Quantified(quantifier, variable, body), depth + 1  # type: ignore[arg-type]
        self._limit(depth)
        return body, depth

    def _lone_name(self) -> bool:
        """Whether ``(name)`` comes next: what is left of ``∀xP(x)`` when ``xP`` is read as the variable."""
        kinds = [token.kind for token in self.tokens[self.at : self.at + 3]]
        return kinds == ["(", "name", ")"]

    def variable(self) -> str:
        return self.take("name", "a variable").value

    def atom(self, level: int) -> Formula:
        if self.next.kind not in ("name", "number"):
            raise self.error(f"expected a formula, found {self.next.value!r}" if self.next.kind != "end" else
                             "expected a formula, but the text ends")
        start = self.next
        term = self.term(level)
        if self.next.kind in (EQUALS, "≠") and not self.compat:
            unequal = self.next.kind == "≠"
            self.at += 1
            same = Atom(EQUALS, (term, self.term(level)))
            return Not(same) if unequal else same
        if start.kind == "number":
            raise self.error(f"expected a predicate, found the number {start.value}", start)
        if self.compat and not term.arguments:
            raise self.error(f"predicate {term.name} has no terms", start)
        if self.compat and any(argument.arguments for argument in term.arguments):
            raise self.error(f"a function in {term.name}, which compat does not read", start)
        return Atom(term.name, term.arguments)

    def term(self, level: int) -> Term:
        self._limit(level)
        token = self.next
        if token.kind == "number":
            self.at += 1
            return Term(token.value)
        name = self.take("name", "a term").value
        arguments: list[Term] = []
        if self.next.kind == "(":
            self.at += 1
            arguments.append(self.term(level + 1))
            while self.next.kind == ",":
                self.at += 1
                arguments.append(self.term(level + 1))
            self.take(")", "a comma or a closing bracket")
        return Term(name, tuple(arguments))

    def _limit(self, level: int) -> None:
        if level > MAX_DEPTH:
            raise self.error(f"nested deeper than {MAX_DEPTH}")

    def _check_spelling(self) -> None:
        for token in self.tokens:
            if token.kind in (".", ":", "=", "≠") or ((token.kind in PRECEDENCE or token.kind in QUANTIFIERS) and \
                    self.text[token.position] != token.kind):
                raise self.error(f"{self.text[token.position]!r} is no symbol that compat reads", token)


def _to_front(formula: Formula) -> Formula:
    prefix: list[Quantified] = []

    def strip(node: Formula) -> Formula:
        if isinstance(node, Quantified):
            prefix.append(node)
            return strip(node.body)
        if isinstance(node, Binary):
            left = strip(node.left)
            return Binary(node.operator, left, strip(node.right))
        return Not(strip(node.body)) if isinstance(node, Not) else node

    body = strip(formula)
    for node in reversed(prefix):
        body = Quantified(node.quantifier, node.variable, body)
    return body


def try_parse(text: str, *, compat: bool = False) -> Formula | None:
    """:func:`parse`, with None for text that is no formula."""
    try:
        return parse(text, compat=compat)
    except FormulaError:
        return None


def formula_tokens(text: str, *, compat: bool = False) -> list[str]:
    """Tokens of a formula as text: symbols, brackets, commas and names, whatever the spelling and the spacing."""
    return [token.value for token in tokenize(text, compat=compat)]
