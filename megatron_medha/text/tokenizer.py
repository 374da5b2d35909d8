"""The checkpoint's tokenizer: text to token ids and back. Which files it is read from: tokenizer_source.py."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from megatron_medha.core.errors import CheckpointError, DependencyError
from megatron_medha.safe_files.checkpoint_files import cut, read_bytes
from megatron_medha.text.border_tokens import border_tokens
from megatron_medha.text.chat.chat_template import ChatTemplate, ChatTemplateError
from megatron_medha.text.text_slices import CHAR_OF_BYTE, SLICE_CHARS, slice_encoder
from megatron_medha.text.tokenizers.added_tokens import token_name
from megatron_medha.text.tokenizers.piece_backend import PieceBackend
from megatron_medha.text.tokenizers.tokenizer_file import panics_as_errors
from megatron_medha.text.tokenizers.tokenizer_source import find_tokenizer, no_tokenizer, read_tokenizer

if TYPE_CHECKING:
    import tokenizers

# Patterns that never end are likely to show at repetitions.
_TRIAL = "Hello, world! 12345 \n\t" + "a" * 64 + " " * 64 + "1" * 64 + "." * 64 + "\u4f60\u597d"
_MAX_TEMPLATE_BYTES = 4 << 20
_SOME_TEXT = "a b"  # of which no tokenizer removes everything
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")


class TooManyTokens(Exception):
    """A text has more tokens than were asked for; it is not encoded to its end."""

    def __init__(self, at_least: int) -> None:
        super().__init__(f"at least {at_least} tokens")
        self.at_least = at_least


class PieceKind(Enum):
    """How a vocabulary entry stands for bytes of text."""

    BYTE_LEVEL = "byte_level"  # each character is one byte, in GPT-2's alphabet
    PIECES = "pieces"          # text with replacements, and <0xNN> for single bytes (SentencePiece's way)
    OTHER = "other"            # only the library knows (WordPiece's ##, CTC): text comes from decoding windows


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerConfig:
    """What the files beside a tokenizer say."""

    bos_token: str | None = None
    eos_token: str | None = None
    other_tokens: dict[str, str] = field(default_factory=dict)  # unk_token, pad_token...: templates may name them
    add_bos_token: bool | None = None  # None: whatever the tokenizer's post-processor does
    splits_special_tokens: bool = False  # whether the names of special tokens in a text are text
    chat_template: str | None = None


class Tokenizer:
    """Encodes prompts and decodes tokens. Methods may be called from any thread."""

    def __init__(self, backend: tokenizers.Tokenizer | PieceBackend, config: TokenizerConfig) -> None:
        self._backend = backend
        self.config = config
        special = {**config.other_tokens, "bos_token": config.bos_token or "", "eos_token": config.eos_token or ""}
        self.template = ChatTemplate(config.chat_template, special)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.bos_token_id: int | None = backend.token_to_id(config.bos_token) if config.bos_token else None
        self.eos_token_id: int | None = backend.token_to_id(config.eos_token) if config.eos_token else None
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.kind, self._replacements = _piece_kind(backend.decoder)
        self._bytes_by_id: dict[int, bytes] = {}
        # A byte-level tokenizer never shrinks text except into its longest entry, so a prompt that
        # cannot fit is refused without encoding it: 100 MB of text would keep a core busy for a minute.
        # Others compose characters (of up to four, by NFC and NFKC) or strip a few.
        strips = any(token.lstrip or token.rstrip for token in added.values())
        is_exact = self.kind is PieceKind.BYTE_LEVEL and backend.normalizer is None and not strips
        vocab = backend.get_vocab()
        self.max_token_id: int = max(vocab.values(), default=0)
        self._max_token_chars = max(map(len, vocab), default=1) * (1 if is_exact else 4)
        backend.encode_special_tokens = config.splits_special_tokens
        self.border_tokens = border_tokens(backend)
        slices = backend.slice_encoder() if isinstance(backend, PieceBackend) else slice_encoder(backend)
        self._encode_slices = None if config.splits_special_tokens else slices

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """That of a checkpoint, a directory or a GGUF file. CheckpointError names what is missing or broken."""
        import tokenizers

        source = find_tokenizer(directory)
        if source is None:
            raise CheckpointError(f"{directory}: {no_tokenizer(directory)}")
        path = source.files[0]
        found = read_tokenizer(source)
        try:
            with panics_as_errors():
                vocabulary = tokenizers.Tokenizer.from_str(found.content)
                vocabulary.no_truncation()
                vocabulary.no_padding()
                backend = vocabulary if found.pieces is None else PieceBackend(found.pieces, vocabulary)
                backend.encode(_TRIAL)  # some broken files show at the first text only
        except DependencyError:
            raise
        except Exception as error:  # the library raises bare Exception for every kind of broken file
            raise CheckpointError(f"{path} is no valid tokenizer: {cut(error)}") from error
        try:
            begins = path.name != "tokenizer.json"
            return cls(backend, tokenizer_config(found.settings, source.directory, begins=begins))
        except ChatTemplateError as error:
            raise CheckpointError(f"{directory}: {error}") from error

    def as_json(self) -> str:
        """The contents of tokenizer.json."""
        text: str = self._backend.to_str()
        return text

    def encode(self, text: str, *, add_special_tokens: bool = True, max_tokens: int | None = None) -> array[int]:
        """Token ids of a text, int32. With special tokens: what the post-processor and add_bos_token ask for.

        TooManyTokens as soon as there are more than max_tokens.
        """
        adds = add_special_tokens and self.config.add_bos_token is not False
        ids = array("i")
        with panics_as_errors():
            for part in self._parts(text, adds):
                ids.extend(part)
                if max_tokens is not None and len(ids) > max_tokens:
                    raise TooManyTokens(len(ids))
        if adds:
            self._add_bos(ids)
        return ids

    def with_special_tokens(self, ids: array[int]) -> array[int]:
        """Ids of a text that were encoded without special tokens, with those that encode() adds; not changed."""
        if self.config.add_bos_token is False:
            return ids
        with panics_as_errors():
            before, after = self._around(True)
        if before or after or self._lacks_bos(ids):
            ids = array("i", before) + ids + array("i", after)
            self._add_bos(ids)
        return ids

    def _add_bos(self, ids: array[int]) -> None:
        if self._lacks_bos(ids):
            assert self.bos_token_id is not None
            ids.insert(0, self.bos_token_id)

    def _lacks_bos(self, ids: array[int]) -> bool:
        bos = self.bos_token_id
        return bool(self.config.add_bos_token and bos is not None and (not ids or ids[0] != bos))

    def _around(self, adds_special: bool) -> tuple[Sequence[int], Sequence[int]]:
        """What the post-processor puts around a text: what belongs to no text."""
        around = self._backend.encode(_SOME_TEXT, add_special_tokens=adds_special)
        num_before = around.sequence_ids.index(0) if 0 in around.sequence_ids else len(around)
        num_after = around.sequence_ids[::-1].index(0) if 0 in around.sequence_ids else 0
        return around.ids[:num_before], around.ids[len(around) - num_after :]

    def _parts(self, text: str, adds_special: bool) -> Iterator[Sequence[int]]:
        if len(text) <= SLICE_CHARS or self._encode_slices is None:
            # encode() would hold the interpreter lock throughout; the batch form releases it, and the event loop lives.
            yield self._backend.encode_batch_fast([text], add_special_tokens=adds_special)[0].ids
            return
        before, after = self._around(adds_special)
        yield before
        yield from self._encode_slices(text)
        yield after

    def max_chars(self, num_tokens: int) -> int:
        """The length that no text of so many tokens exceeds."""
        return (num_tokens + 1) * self._max_token_chars

    def min_num_tokens(self, text: str) -> int:
        """A cheap lower bound on the number of tokens of a text."""
        return len(text) // self._max_token_chars

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of a whole sequence."""
        # As for encoding, only the batch form releases the interpreter lock.
        with panics_as_errors():
            text: str = self._backend.decode_batch([list(token_ids)], skip_special_tokens=skip_special_tokens)[0]
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to a text, special tokens by name; empty for ids beyond the vocabulary."""
        known = self._bytes_by_id.get(token_id)
        if known is None:
            known = self._bytes_by_id[token_id] = self._find_bytes(token_id)
        return known

    def token_name(self, token_id: int) -> str:
        """One token as a string that differs from every other token's where text allows it.

        A token that is not valid UTF-8 by itself is shown as OpenAI does, "bytes:\\xe2\\x82": shown as
        replacement characters, different tokens would collide in top_logprobs.
        """
        raw = self.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def token_id(self, token: str) -> int | None:
        """The id of the token with this name; None where there is none."""
        token_id: int | None = self._backend.token_to_id(token)
        return token_id

    def _find_bytes(self, token_id: int) -> bytes:
        piece: str | None = self._backend.id_to_token(token_id) if 0 <= token_id < 2**32 else None
        if piece is None:
            return b""
        if self.kind is PieceKind.OTHER:
            text: str = self._backend.decode([token_id], skip_special_tokens=False)
            return text.encode()
        if self.kind is PieceKind.BYTE_LEVEL:
            try:
                return bytes(_BYTE_OF_CHAR[char] for char in piece)
            except KeyError:  # an added token: its text stands for itself
                return piece.encode()
        if (match := _BYTE_PIECE.match(piece)) is not None and ("<0x", ">") in self._replacements:
            return bytes((int(match.group(1), 16),))
        for old, new in self._replacements:
            if (old, new) != ("<0x", ">"):
                piece = piece.replace(old, new)
        return piece.encode()


def tokenizer_config(settings: Mapping[str, Any], directory: Path, *, begins: bool) -> TokenizerConfig:
    """What the settings beside a tokenizer say, and chat_template.jinja in that directory, if present.

    begins: add_bos_token counts. It is passed over, as by transformers 5, where there is a tokenizer.json, whose
    post-processor says what is put around a text; and add_eos_token is always.
    """
    special = {}
    for key, value in settings.items():
        text = token_name(value)
        if key.endswith("_token") and text is not None:
            special[key] = text
    return TokenizerConfig(
        bos_token=special.pop("bos_token", None),
        eos_token=special.pop("eos_token", None),
        other_tokens=special,
        add_bos_token=settings.get("add_bos_token") is True if begins else None,
        splits_special_tokens=settings.get("split_special_tokens") is True,
        chat_template=_find_chat_template(directory, settings.get("chat_template")),
    )


def _find_chat_template(directory: Path, configured: Any) -> str | None:
    """One template that does what transformers does with several: tool_use where there are tools, else the default."""
    found = _chat_templates(directory, configured)
    default, with_tools = found.get("default"), found.get("tool_use")
    if found and default is None:
        names = ", ".join(sorted(found)).replace("'", "")
        default = f"{{{{ raise_exception('of the chat templates {names} none is the default') }}}}"
    if with_tools is None or default is None:
        return default
    # The last newline of a template is dropped, which inside of a block it is not.
    with_tools, default = with_tools.removesuffix("\n"), default.removesuffix("\n")
    return f"{{%+ if tools +%}}{with_tools}{{%+ else +%}}{default}{{%+ endif +%}}"


def _chat_templates(directory: Path, configured: Any) -> dict[str, str]:
    """By name. Files go before what tokenizer_config.json says, as in transformers."""
    paths = {path.stem: path for path in sorted(directory.glob("additional_chat_templates/*.jinja"))}
    if (path := directory / "chat_template.jinja").is_file():
        paths["default"] = path
    if paths:
        return {
            name: read_bytes(path, _MAX_TEMPLATE_BYTES).decode(errors="replace") for name, path in paths.items()
        }
    if isinstance(configured, list):
        configured = {str(one.get("name")): one.get("template") for one in configured if isinstance(one, dict)}
    named = configured if isinstance(configured, dict) else {"default": configured}
    return {str(name): template for name, template in named.items() if isinstance(template, str)}


def _piece_kind(decoder: Any) -> tuple[PieceKind, list[tuple[str, str]]]:
    # Reads the decoder's own description. ("<0x", ">") among the replacements stands for ByteFallback.
    if decoder is None:
        return PieceKind.OTHER, []
    state = msgspec.json.decode(decoder.__getstate__())
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    replacements: list[tuple[str, str]] = []
    kind = PieceKind.PIECES
    for step in steps:
        match step["type"]:
            case "ByteLevel":
                kind = PieceKind.BYTE_LEVEL
            case "Fuse":
                pass
            case "Strip":
                pass  # of the first space of a whole text; an output continues its prompt and keeps it
            case "ByteFallback":
                replacements.append(("<0x", ">"))
            case "Metaspace":
                replacements.append((step["replacement"], " "))
            case "Replace" if "String" in step["pattern"]:
                replacements.append((step["pattern"]["String"], step["content"]))
            case _:
                return PieceKind.OTHER, []
    if kind is PieceKind.BYTE_LEVEL and replacements:
        return PieceKind.OTHER, []
    return kind, replacements


_BYTE_OF_CHAR = {char: byte for byte, char in enumerate(CHAR_OF_BYTE)}
