"""Tokens that only the files beside tokenizer.json name, added to it as transformers adds them.

tokenizer_config.json names tokens in added_tokens_decoder, as *_token and in lists of special ones; where it has no
added_tokens_decoder, special_tokens_map.json goes before it and added_tokens.json is read too.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from megatron_medha.core.errors import CheckpointError
from megatron_medha.safe_files.checkpoint_files import cut, read_json_object, shown
from megatron_medha.text.tokenizers.tokenizer_file import panics_as_errors, read_tokenizer_file

if TYPE_CHECKING:
    import tokenizers

# In the order in which transformers adds them; others named *_token follow.
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("extra_special_tokens", "additional_special_tokens")  # of transformers 5 and 4


class _SpecialToken(msgspec.Struct):
    """A token and how it is found in text, as files write it."""

    content: str
    id: int | None = None
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool | None = None  # None: special ones are not
    special: bool = True

    def __post_init__(self) -> None:
        """Settle what depends on the kind."""
        if self.normalized is None:
            self.normalized = not self.special

    def flags(self) -> tuple[Any, ...]:
        """What makes two of them the same."""
        return self.content, self.lstrip, self.rstrip, self.single_word, self.normalized, self.special


class _File(msgspec.Struct):
    """Of tokenizer.json, its added tokens."""

    added_tokens: list[_SpecialToken] = []


def token_settings(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json, with special_tokens_map.json where transformers looks at it."""
    settings = _read(directory / "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:
        settings |= _read(directory / "special_tokens_map.json")
    return settings


def token_name(value: object) -> str | None:
    """The text of a token that a file names by its text or with its flags."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def read_whole_tokenizer(path: Path) -> str:
    """The contents of tokenizer.json with all tokens in it, safe to give to the library.

    Raises CheckpointError naming the file at fault, also where a token would get another id than a file says.
    """
    return with_tokens_beside(read_tokenizer_file(path), path)


def with_tokens_beside(content: str, path: Path) -> str:
    """The contents of a tokenizer.json that was made from that file, with the tokens that only files beside it name."""
    try:
        present = msgspec.json.decode(content, type=_File).added_tokens
    except (msgspec.MsgspecError, RecursionError) as error:
        raise CheckpointError(f"{path} is no valid tokenizer: {cut(error)}") from error
    try:
        missing = _missing(path.parent, present)
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path.parent / 'tokenizer_config.json'}: its tokens cannot be read: {error}") from error
    return _with(content, missing, path) if missing else content


def _missing(directory: Path, present: list[_SpecialToken]) -> list[_SpecialToken]:
    """Tokens that transformers would add to those, in its order."""
    settings = token_settings(directory)
    numbered = _numbered(directory, settings)
    same = {token.flags() for token in present}
    known = {token.content for token in present}
    found = [token for token in numbered if token.flags() not in same]
    known |= {token.content for token in found}
    named = [settings.get(key) for key in _NAMED]
    named += [value for key, value in settings.items() if key.endswith("_token") and key not in _NAMED]
    special = set(map(token_name, named))
    extra: Any = next((settings[key] for key in _LISTS if settings.get(key)), [])
    named += extra.values() if isinstance(extra, dict) else extra if isinstance(extra, list) else []
    for value in named:
        if not isinstance(value, str | dict):
            continue  # add_bos_token is a flag, and a token may be null
        token = _converted(value, directory / "tokenizer_config.json")
        if token.content not in known:
            known.add(token.content)
            found.append(token)
    return [msgspec.structs.replace(token, special=True) if token.content in special else token for token in found]


def _numbered(directory: Path, settings: dict[str, Any]) -> list[_SpecialToken]:
    """Tokens that come with their ids, in the order of those."""
    path, stated = directory / "tokenizer_config.json", settings.get("added_tokens_decoder")
    if stated is None:
        path, stated = directory / "added_tokens.json", {}
        special = {token_name(settings.get(key)) for key in _NAMED}
        special |= {token_name(value) for key in _LISTS for value in settings.get(key) or []}
        for text, token_id in _read(path).items():
            stated[token_id] = {"content": text, "special": text in special}
    if not isinstance(stated, dict):
        raise CheckpointError(f"{path}: added_tokens_decoder={shown(stated)} must be an object")
    found = []
    for token_id, value in stated.items():
        if not str(token_id).isdecimal():
            raise CheckpointError(f"{path}: a token has the id {shown(token_id)}, which must be a number")
        token = _converted({"special": False, **value} if isinstance(value, dict) else value, path)
        found.append(msgspec.structs.replace(token, id=int(token_id)))
    return sorted(found, key=lambda token: token.id or 0)


def _converted(value: object, path: Path) -> _SpecialToken:
    try:
        token = msgspec.convert({"content": value} if isinstance(value, str) else value, _SpecialToken)
        token.content.encode()  # half a surrogate pair is no text, and crashes the library
        return token
    except (msgspec.ValidationError, UnicodeEncodeError) as error:
        raise CheckpointError(f"{path}: {shown(value)} is no token: {error}") from error


def _with(content: str, missing: list[_SpecialToken], path: Path) -> str:
    import tokenizers

    try:
        with panics_as_errors():
            backend = tokenizers.Tokenizer.from_str(content)
    except Exception as error:  # the library raises bare Exception for every kind of broken file
        raise CheckpointError(f"{path} is no valid tokenizer: {cut(error)}") from error
    backend.add_tokens([_for_library(token) for token in missing])
    for token in missing:
        if token.id is not None and (got := backend.token_to_id(token.content)) != token.id:
            raise CheckpointError(
                f"{path}: has no token {shown(token.content)}; the files beside it give it the id {token.id}, the "
                f"next one free is {got}. Save the tokenizer again (save_pretrained)"
            )
    text: str = backend.to_str()
    return text


def _for_library(token: _SpecialToken) -> tokenizers.AddedToken:
    import tokenizers

    content, lstrip, rstrip, single_word, normalized, special = token.flags()
    return tokenizers.AddedToken(
        content, lstrip=lstrip, rstrip=rstrip, single_word=single_word, normalized=normalized, special=special
    )


def _read(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}
