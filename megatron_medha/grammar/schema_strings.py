"""Patterns and formats of a JSON schema, as llguidance can keep them: it has no look-around, and ten formats."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

# The library's own.
_FORMATS = frozenset({
    "date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri",
})  # fmt: skip
# Formats all of whose values the library can write by another name, or some of them.
_NARROWER_FORMATS = {
    "idn-email": "email", "idn-hostname": "hostname", "iri": "uri", "uri-reference": "uri", "iri-reference": "uri",
    "uri-template": "uri", "ipvanyaddress": "ipv4", "ipv4network": "ipv4", "ipv4interface": "ipv4",
    "ipvanynetwork": "ipv4", "ipvanyinterface": "ipv4", "ipv6network": "ipv6", "ipv6interface": "ipv6",
    "guid": "uuid", "url": "uri",
}  # fmt: skip
_HEX = "[0-9a-f]"
_UUID = f"^{_HEX}{{8}}-{_HEX}{{4}}-%s{_HEX}{{3}}-[89ab]{_HEX}{{3}}-{_HEX}{{12}}$"
_FORMAT_PATTERNS = {
    **{f"uuid{version}": _UUID % version for version in (1, 3, 4, 5, 6, 7, 8)},
    "base64": "^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/][AQgw]==|[A-Za-z0-9+/]{2}[AEIMQUYcgkosw048]=)?$",
    "base64url": "^([A-Za-z0-9_-]{4})*([A-Za-z0-9_-][AQgw]==|[A-Za-z0-9_-]{2}[AEIMQUYcgkosw048]=)?$",
    "name-email": r"^[A-Za-z0-9]+(\.[A-Za-z0-9]+)*@[a-z0-9]+(\.[a-z0-9]+)*\.[a-z]{2,}$",
    "fraction": "^-?(0|[1-9][0-9]*)(/[1-9][0-9]*)?$",
    "json-pointer": "^(/([^/~]|~[01])*)*$",
    "relative-json-pointer": "^(0|[1-9][0-9]*)(#|(/([^/~]|~[01])*)*)$",
}
# For names of properties, which the library knows by pattern only.
_KEY_FORMATS = {
    "uuid": f"^{_HEX}{{8}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{12}}$",
    "date": "^[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])$",
    "time": "^([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]Z$",
    "date-time": "^[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])T([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]Z$",
    "ipv4": r"^((25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])\.){3}(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])$",
    "ipv6": f"^{_HEX}{{1,4}}(:{_HEX}{{1,4}}){{7}}$",
    "email": _FORMAT_PATTERNS["name-email"],
    "duration": "^P([1-9][0-9]*D)?(T[1-9][0-9]*S)?$",
}

_LOOK_AROUND = re.compile(r"\(\?<?[=!]")
# Patterns that libraries write, without look-around. Each matches a part of what it stands for.
_EMAIL_CHARS = r"[A-Za-z0-9_'+\-]"
_EMAIL = rf"^({_EMAIL_CHARS}+\.)*{_EMAIL_CHARS}*[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{{2,}}$"
_DURATION = r"^P(\d+W|(\d+Y)?(\d+M)?\d+D(T(\d+H)?(\d+M)?\d+S)?|(\d+Y)?(\d+M)?T(\d+H)?(\d+M)?\d+S)$"
_BEGINNINGS = (
    (r"^(?!\.)(?!.*\.\.)([A-Z", _EMAIL),             # zod's email
    (r"^P(?:(\d+W)|(?!.*W)(?=\d|T\d)", _DURATION),  # zod's duration
    (r"^P(?!$)", _DURATION),
)
_DECIMAL = re.compile(r"\^\(\?!\^\[-\+\.\]\*\$\)\[\+-\]\?0\*(.*)\Z", re.DOTALL)  # of pydantic up to 2.12
_MAX_DECIMAL_DIGITS = 40

RefuseString = Callable[[str, str], None]


def with_strings(made: dict[str, Any], given: dict[str, Any], refuse: RefuseString) -> None:
    """Pattern and format in `made` as the library can keep them; what it cannot is refused by its key."""
    name = made.pop("format", None)
    pattern = made.get("pattern")
    if isinstance(pattern, str) and _LOOK_AROUND.search(pattern):
        patterns = without_look_around(pattern)
        if patterns is None:
            refuse("pattern", "look-around, (?=...) or (?!...), cannot be kept; say it without, or as several patterns "
                              "in allOf")  # fmt: skip
            patterns = [""]
        made["pattern"] = patterns[0]
        if patterns[1:]:
            made["allOf"] = [*made.get("allOf", ()), *({"pattern": one} for one in patterns[1:])]
    if not isinstance(name, str):
        return
    if name in _FORMATS or name in _NARROWER_FORMATS:
        made["format"] = _NARROWER_FORMATS.get(name, name)
    elif name in _FORMAT_PATTERNS and "pattern" not in made:
        made["pattern"] = _FORMAT_PATTERNS[name]


def key_pattern(names: dict[str, Any]) -> str | None:
    """The pattern of a schema for the names of properties: "" where any name matches, None where it has none."""
    least, most = names.get("minLength", 0), names.get("maxLength")
    pattern, name = names.get("pattern"), names.get("format")
    if pattern is not None:
        patterns = without_look_around(pattern) if isinstance(pattern, str) else None
        return patterns[0] if patterns is not None and len(patterns) == 1 and not least and most is None else None
    if least or most is not None:
        return f"^(.|\\n){{{least},{'' if most is None else most}}}$"
    if not isinstance(name, str):
        return ""
    narrower = _NARROWER_FORMATS.get(name, name)
    return _KEY_FORMATS.get(narrower) or _FORMAT_PATTERNS.get(narrower, "")


def without_look_around(pattern: str) -> list[str] | None:
    """Patterns that together match what this one does, or a part of it; None where none are known."""
    if not _LOOK_AROUND.search(pattern):
        return [pattern]
    for beginning, stand_in in _BEGINNINGS:
        if pattern.replace("[0-9]", r"\d").startswith(beginning):
            return [stand_in]
    if found := _DECIMAL.match(pattern):
        return [_decimal(found.group(1))]
    patterns = []
    while pattern.startswith(("^(?=", "^(?!")):
        inner, rest = _split_group(pattern[1:])
        if inner is None:
            return None
        one = "^" + inner.removeprefix("^") if pattern.startswith("^(?=") else _other_than(inner)
        if one is None:
            return None
        patterns.append(one)
        pattern = "^" + rest
    if _LOOK_AROUND.search(pattern) or any(_LOOK_AROUND.search(one) for one in patterns):
        return None
    return [pattern, *patterns]


def _other_than(inner: str) -> str | None:
    """The pattern of texts that do not begin so: of one character, or of one that is nowhere."""
    inner = inner.removeprefix("^")
    if inner == "$":
        return "^(.|\\n)"
    if found := re.fullmatch(r"\.\*(\\?.|\[[^\]\\]+\])", inner):
        forbidden = _class_without(found.group(1))
        return None if forbidden is None else f"^{forbidden}*$"
    if found := re.fullmatch(r"\.\*(\\\W)\1", inner):
        one = found.group(1)
        return f"^([^{one}]|{one}[^{one}])*({one})?$"
    forbidden = _class_without(inner)
    return None if forbidden is None else f"^({forbidden}|$)"


def _class_without(one: str) -> str | None:
    """The class of all characters but this one, or but those of this class."""
    if re.fullmatch(r"\[\^?[^\]\\]+\]", one):
        return "[" + one[2:] if one.startswith("[^") else "[^" + one[1:]
    if re.fullmatch(r"\\\W|[A-Za-z0-9_ -]", one):
        return f"[^{one}]"
    return {"\\d": "[^0-9]", "\\s": "[^\\s]", "\\w": "[^A-Za-z0-9_]"}.get(one)


def _split_group(text: str) -> tuple[str | None, str]:
    """What is in the look-ahead that `text` begins with, and what follows it."""
    depth, place, is_class = 0, 0, False
    while place < len(text):
        match text[place]:
            case "\\":
                place += 1
            case "[":
                is_class = True
            case "]":
                is_class = False
            case "(" if not is_class:
                depth += 1
            case ")" if not is_class:
                depth -= 1
                if not depth:
                    return text[3:place], text[place + 1 :]
            case _:
                pass
        place += 1
    return None, ""


def _decimal(rest: str) -> str:
    """pydantic's pattern for decimals after its beginning, without look-ahead: with as many digits at most."""
    most = re.search(r"\{1,(\d+)\}", rest)
    whole = re.search(r"(?<!\.)(?<!\?)\\d\{0,(\d+)\}", rest)
    places = re.search(r"\.\??\\d\{0,(\d+)\}", rest)
    if whole is not None and places is not None:
        num_whole, num_places = (
            min(int(whole.group(1)), _MAX_DECIMAL_DIGITS),
            min(int(places.group(1)), _MAX_DECIMAL_DIGITS),
        )
        if most is not None:
            num_places = min(num_places, int(most.group(1)) - 1)
        fraction = rf"(\.\d{{1,{num_places}}})" if num_places else ""
        if not num_whole:
            return rf"^[+-]?0?{fraction}$" if fraction else "^0$"
        return rf"^[+-]?\d{{1,{num_whole}}}{fraction}?$" if fraction else rf"^[+-]?\d{{1,{num_whole}}}$"
    if whole is not None:
        num_digits = min(int(whole.group(1)), _MAX_DECIMAL_DIGITS)
        split = [rf"\d{{1,{some}}}\.\d{{1,{num_digits - some}}}" for some in range(1, num_digits)]
        either = "|".join([rf"\d{{1,{num_digits}}}", *split])
        return f"^[+-]?({either})$"
    if places is not None:
        return rf"^[+-]?\d+(\.\d{{1,{places.group(1)}}})?$" if int(places.group(1)) else r"^[+-]?\d+$"
    return r"^[+-]?(\d+\.?\d*|\.\d+)$"
