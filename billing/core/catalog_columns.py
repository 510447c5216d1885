"""Readers of one value of a catalog file. Each says what is wrong and what to write instead.

A reader returns the value, or raises ValueError with a sentence that goes after the name of the key.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Any

from billing.core.currencies import get_exponent
from billing.core.errors import BillingError

INTEGER_MAX = 2**31 - 1
SLUG_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
# A number such as 0.30 becomes this when the file is read: no float ever exists, and the message can quote it.
DECIMAL_PATTERN = re.compile(r"[0-9]{1,20}(\.[0-9]{1,18})?")

type Reader = Callable[[object], Any]

# The key of a dataclass field's metadata.
READER = "reader"
ROWS = "rows"


class FloatLiteral(str):
    """A TOML float as it stands in the file. Every reader refuses it: money and quantities are exact."""

    __slots__ = ()


def column(reader: Reader, **default: Any) -> Any:
    """Declare a field that `reader` reads; required unless a `default` is given."""
    return dataclasses.field(metadata={READER: reader}, **default)


def rows(row_type: type, **default: Any) -> Any:
    """Declare a field that holds an array of tables of `row_type`."""
    return dataclasses.field(metadata={ROWS: row_type}, **default)


def describe(value: object) -> str:
    """Return how a value is called in a message."""
    if isinstance(value, FloatLiteral):
        return f"the number {value}"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "an array"
    return f"{value!r}"


def text(length_max: int, *, is_empty_allowed: bool = False) -> Reader:
    """Return a reader of a string of at most `length_max` characters."""

    def read(value: object) -> str:
        if not isinstance(value, str) or isinstance(value, FloatLiteral):
            raise ValueError(f"must be a string in quotes, not {describe(value)}")
        if not value.strip() and not is_empty_allowed:
            raise ValueError("must not be empty")
        if len(value) > length_max:
            raise ValueError(f"is {len(value)} characters long; shorten it to {length_max}")
        return value

    return read


def base_url(value: object) -> str:
    """Read the base URL of an upstream, or "". It is published and shown, so it holds no user and no password."""
    url: str = text(300, is_empty_allowed=True)(value)
    if has_credential(url):
        raise ValueError("must have no user and no password; put the credential in a variable and name it")
    return url


def has_credential(url: str) -> bool:
    """Return whether a URL, well-formed or not, may have a user or a password.

    >>> has_credential("https://user:word@host/v1"), has_credential("https://host/models/a@b")
    (True, False)
    """
    return "@" in url.partition("://")[2].partition("/")[0] or bool(re.match(r"[^/]*//[^/]*:[^/@]*/[^/]*@", url))


def slug(value: object) -> str:
    """Read a name such as `baidu-qianfan`."""
    if not isinstance(value, str) or not SLUG_PATTERN.fullmatch(value):
        raise ValueError(f"must be lower-case letters, digits, '.', '_' and '-' (63 at most), not {describe(value)}")
    return value


def currency(value: object) -> str:
    """Read an ISO 4217 code."""
    try:
        if not isinstance(value, str):
            raise ValueError
        get_exponent(value)
    except (ValueError, BillingError):
        raise ValueError(f'must be an ISO 4217 code such as "USD" or "CNY", not {describe(value)}') from None
    return value


def date(value: object) -> dt.date:
    """Read a TOML date, e.g. `2024-09-01` without quotes."""
    if isinstance(value, dt.date) and not isinstance(value, dt.datetime):
        return value
    raise ValueError(f"must be a date without quotes, e.g. 2024-09-01, not {describe(value)}")


def integer(minimum: int, maximum: int = INTEGER_MAX) -> Reader:
    """Return a reader of a whole number in `minimum..maximum`."""

    def read(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"must be a whole number without quotes, not {describe(value)}")
        if not minimum <= value <= maximum:
            raise ValueError(f"must be from {minimum} to {maximum}, not {value}")
        return value

    return read


def number_of(*numbers: int) -> Reader:
    """Return a reader of one of `numbers`."""

    def read(value: object) -> int:
        if not isinstance(value, int) or value not in numbers:
            raise ValueError(f"must be {' or '.join(map(str, numbers))}, without quotes, not {describe(value)}")
        return value

    return read


def boolean(value: object) -> bool:
    """Read true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false without quotes, not {describe(value)}")
    return value


def choice(*choices: str) -> Reader:
    """Return a reader of one of `choices`."""

    def read(value: object) -> str:
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"must be one of {', '.join(map(repr, choices))}, not {describe(value)}")
        return value

    return read


def choices(*allowed: str) -> Reader:
    """Return a reader of an array whose members are of `allowed`, none twice."""

    def read(value: object) -> tuple[str, ...]:
        if not isinstance(value, list) or any(member not in allowed for member in value):
            raise ValueError(f"must be an array of {', '.join(map(repr, allowed))}, not {value!r}")
        if len(set(value)) < len(value):
            raise ValueError("names something twice; name it once")
        return tuple(value)

    return read


def decimal(*, is_zero_allowed: bool) -> Reader:
    """Return a reader of a decimal number written as a string; floats are refused, for they are not exact.

    At most 20 digits before the point and 18 after it: what `numeric(38,18)` stores without rounding.
    """

    def read(value: object) -> Decimal:
        if isinstance(value, (FloatLiteral, int)) and not isinstance(value, bool):
            raise ValueError(f'must be a string, so that it is exact: write "{value}" in quotes, not {value}')
        if not isinstance(value, str) or not DECIMAL_PATTERN.fullmatch(value):
            raise ValueError(f'must be a decimal number in quotes, e.g. "0.30", not {describe(value)}')
        try:
            number = Decimal(value)
        except InvalidOperation:  # pragma: no cover - the pattern admits numbers only
            raise ValueError(f"is not a number: {value!r}") from None
        if not number and not is_zero_allowed:
            raise ValueError("must be greater than 0")
        return number

    return read


def prices(token_kinds: tuple[str, ...], required: tuple[str, ...]) -> Reader:
    """Return a reader of a table of token kind → price per 1,000,000 tokens."""
    read_price = decimal(is_zero_allowed=True)

    def read(value: object) -> dict[str, Decimal]:
        if not isinstance(value, dict):
            raise ValueError(f'must be a table of token kind = "price per 1,000,000", not {describe(value)}')
        problems = [
            f"{kind!r} is no token kind (use {', '.join(token_kinds)})" for kind in value if kind not in token_kinds
        ]
        problems += [f"has no price for {kind!r}; add one" for kind in required if kind not in value]
        result: dict[str, Decimal] = {}
        for kind, price in value.items():
            try:
                result[kind] = read_price(price)
            except ValueError as error:
                problems.append(f"{kind} {error}")
        if problems:
            raise ValueError("; ".join(problems))
        return result

    return read
