"""Numbers of a JSON schema. llguidance holds them in doubles: what would come out as another number is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from decimal import Decimal
from typing import Any

_MAX_EXACT = 2**53        # up to here every integer is a double
# A bound beyond this is moved to it: limits of 64-bit and floating-point types, to which the library has no digits.
# A number within it is within the bound as well.
_MAX_BOUND = 9 * 10**18
_MAX_COUNT = 2**31 - 1
_MAX_MULTIPLE = 2**32 - 1  # the library's
_MAX_DIGITS = 400
_MIN_READ = 1e-6          # what is nearer to zero is sent as it is, and may come out one digit in 17 off
_BOUNDS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")

RefuseNumber = Callable[[str], None]
Number = int | float


def number_of(text: str) -> Number:
    """A number with a point or an exponent: an int where it is whole, so that none of its digits is lost."""
    value = float(text)
    if math.isfinite(value) and value == value // 1 and abs(value) >= 2**31 and len(text) <= _MAX_DIGITS:
        exact = Decimal(text)
        if exact == exact.to_integral_value():
            return int(exact)
    return value


def literal_of(value: Any, refuse: RefuseNumber) -> Any:
    """A const or enum as the library has to get it; one with a number that would come out as another is refused."""
    match value:
        case bool() | None | str():
            return value
        case int() | float():
            if not _is_exact(value) or (sent := _sent(value)) is None:
                refuse(f"{_shown(value)} would come out as another number; send it as text (a JSON string)")
                return 0
            return sent
        case list():
            return [literal_of(one, refuse) for one in value]
        case _:
            return {name: literal_of(one, refuse) for name, one in value.items()}


def count_of(made: dict[str, Any], key: str, value: Any, refuse: RefuseNumber) -> None:
    """Put a length or count into `made`, if it limits anything."""
    is_whole = isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1 and value >= 0
    if not is_whole:
        refuse(f"expected a whole number, got {_shown(value)}")
    elif value <= _MAX_COUNT:
        made[key] = int(value)
    elif key.startswith("min"):
        refuse(f"{_shown(value)} exceeds what an output can have")


def with_numbers(made: dict[str, Any], given: dict[str, Any], refuse: Callable[[str, str], None]) -> None:
    """Bounds and multipleOf as the library can keep them."""
    for key in _BOUNDS:
        value = made.get(key)
        if value is None or isinstance(value, bool):  # a flag beside minimum, in draft 4
            continue
        if not isinstance(value, int | float):
            refuse(key, f"expected a number, got {_shown(value)}")
            continue
        away = 1 if "aximum" in key else -1
        if away * value > _MAX_BOUND:
            made[key] = away * _MAX_BOUND
        elif -away * value > _MAX_BOUND:
            refuse(key, f"{_shown(value)} is beyond what numbers here can be, {-away * _MAX_BOUND}")
        elif not _is_exact(value):
            refuse(key, f"{_shown(value)} is beyond 2^53 and would be rounded; give a bound within that, or send such "
                        "numbers as text (a JSON string)")  # fmt: skip
        elif (sent := _sent(value)) is not None:
            made[key] = sent
    _check_order(made, given, refuse)
    _check_multiple(made, refuse)
    # The library wants an upper bound where the lower one has so many digits.
    if isinstance(made.get("minimum"), int) and made["minimum"] > _MAX_EXACT:
        made.setdefault("maximum", _MAX_BOUND)
    if isinstance(made.get("maximum"), int) and made["maximum"] < -_MAX_EXACT:
        made.setdefault("minimum", -_MAX_BOUND)


def common_multiple_fault(multiples: Collection[Number]) -> str:
    """Why these cannot be in one schema, if so: where two meet, the library multiplies them in 32 bits, unchecked."""
    product = math.prod(_coefficient(one) or 1 for one in multiples if 0 < one < math.inf) if len(multiples) > 1 else 1
    if product <= _MAX_MULTIPLE:
        return ""
    shown = ", ".join(_shown(one) for one in sorted(multiples))
    return f"multipleOf: {shown} together are too large to be kept; use fewer or smaller ones"


def _check_order(made: dict[str, Any], given: dict[str, Any], refuse: Callable[[str, str], None]) -> None:
    low = [made[key] for key in ("minimum", "exclusiveMinimum") if _is_number(made.get(key))]
    high = [made[key] for key in ("maximum", "exclusiveMaximum") if _is_number(made.get(key))]
    if low and high and max(low) > min(high):
        named = {key: given[key] for key in _BOUNDS if key in given}
        refuse("minimum", "no number is within " + ", ".join(f"{key} {_shown(value)}" for key, value in named.items()))


def _check_multiple(made: dict[str, Any], refuse: Callable[[str, str], None]) -> None:
    value = made.get("multipleOf")
    if value is None:
        return
    if not _is_number(value) or not 0 < value < math.inf:
        refuse("multipleOf", f"expected a number above 0, got {_shown(value)}")
    elif _coefficient(value) is None:
        refuse("multipleOf", f"{_shown(value)} has too many digits to be kept")


def _coefficient(value: Number) -> int | None:
    """The digits that the library would compute with; None where they are others, or too many."""
    digits = Decimal(repr(value))
    exponent = 0
    scaled = float(value)
    while scaled != scaled // 1 and scaled <= _MAX_MULTIPLE:
        scaled, exponent = scaled * 10, exponent + 1
    return int(scaled) if scaled <= _MAX_MULTIPLE and Decimal(int(scaled)).scaleb(-exponent) == digits else None


def _is_exact(value: Number) -> bool:
    if abs(value) <= _MAX_EXACT or (isinstance(value, float) and not math.isfinite(value)):
        return math.isfinite(value)
    try:
        held = float(value)
    except OverflowError:
        return False
    # It is written with a double's shortest digits, or, in 64 bits, with all of them.
    return Decimal(repr(held)) == value and (abs(value) >= 2**63 or int(held) == value)


def _sent(value: Number) -> Number | None:
    """The number to send so that the library has `value`: it reads decimals with an error of the last bit at times."""
    if abs(value) < _MIN_READ or (isinstance(value, int) and abs(value) < 2**63):
        return value
    tried = above = below = value = float(value)
    for _ in range(4):
        for tried in (above, below):
            if _as_read(tried) == value:
                return tried
        above, below = math.nextafter(above, math.inf), math.nextafter(below, -math.inf)
    return None


def _as_read(value: float) -> float:
    # As serde_json does: all digits as an integer, then one multiplication or division.
    _, digits, exponent = Decimal(repr(value)).as_tuple()
    whole = math.copysign(float(int("".join(map(str, digits)))), value)
    assert isinstance(exponent, int)
    power = float(f"1e{abs(exponent)}")  # 10.0**23 is another
    return whole / power if exponent < 0 else whole * power


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
