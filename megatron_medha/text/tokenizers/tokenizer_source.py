"""Which files a checkpoint's tokenizer is in, of whatever kind, and reading them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_medha.core.errors import CheckpointError
from megatron_medha.safe_files.checkpoint_files import cut, open_regular, shown
from megatron_medha.safe_files.saved_args import iteration_of, read_saved_args
from megatron_medha.text.tokenizers.added_tokens import read_whole_tokenizer, token_settings, with_tokens_beside
from megatron_medha.text.tokenizers.byte_pair_files import read_gpt2_files, read_megatron_tiktoken, read_tiktoken_file
from megatron_medha.text.tokenizers.gguf_tokenizer import read_gguf_tokenizer
from megatron_medha.text.tokenizers.sentencepiece_file import read_sentencepiece
from megatron_medha.text.tokenizers.tokenizer_json import ReadTokenizer

log = logging.getLogger(__name__)

LOOKED_FOR = (
    "tokenizer.json, a SentencePiece or tiktoken file (tokenizer.model, *.model, *.tiktoken), Megatron's TikTokenizer "
    "JSON, vocab.json with merges.txt"
)
_PAIRS = (("vocab.json", "merges.txt"), ("gpt2-vocab.json", "gpt2-merges.txt"), ("encoder.json", "vocab.bpe"))
_NEMO = Path("..") / "context" / "nemo_tokenizer"
# Megatron's --tokenizer-type, by what its file is.
_OF_PIECES = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
_OF_GPT2 = ("GPT2BPETokenizer",)
_OF_TIKTOKEN = ("TikTokenizer",)
_OF_HUGGING_FACE = ("HuggingFaceTokenizer", "MultimodalTokenizer", "SFTTokenizer")
_TIKTOKEN_ARGS = ("tiktoken_pattern", "tiktoken_num_special_tokens", "tiktoken_special_tokens", "vocab_size")

Read = Callable[..., ReadTokenizer]


@dataclass(frozen=True, slots=True)
class TokenizerSource:
    """Files that a tokenizer is in, and what a checkpoint's arguments say about it."""

    files: tuple[Path, ...]
    read: Read
    stated: Mapping[str, Any] = field(default_factory=dict)

    @property
    def directory(self) -> Path:
        """Where the files about special tokens and the chat template lie."""
        return self.files[0].parent


def find_tokenizer(home: Path) -> TokenizerSource | None:
    """The tokenizer of the checkpoint in that directory or GGUF file; None if there is none.

    Files in the directory go before those that a Megatron checkpoint's arguments name. Raises CheckpointError if those
    arguments cannot be read, or name a tokenizer that is not there.
    """
    if home.is_file():
        return TokenizerSource((home,), _read_gguf) if home.suffix == ".gguf" else None
    iteration = iteration_of(home)
    args = {} if iteration is None else read_saved_args(iteration)
    for directory in _directories(home, iteration):
        found = list(_found_in(directory, args))
        if found:
            first, *others = found
            if others:
                fields = {"file": str(first.files[0]), "passed_over": [each.files[0].name for each in others]}
                log.info("tokenizer_chosen", extra={"fields": fields})
            return first
    return _named_by(args, home)


def read_tokenizer(source: TokenizerSource) -> ReadTokenizer:
    """Its contents, with the tokens that only files beside it name. Raises CheckpointError naming the file at fault."""
    path = source.files[0]
    try:
        found = source.read(*source.files, {**source.stated, **token_settings(source.directory)})
        if path.name != "tokenizer.json":
            found = found._replace(content=with_tokens_beside(found.content, path))
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{path}: a token is no text: {cut(error)}") from error
    return found


def no_tokenizer(home: Path) -> str:
    """That no tokenizer was found there, and the way out."""
    names = sorted(path.name for path in home.iterdir())[:8] if home.is_dir() else []
    there = f" It holds: {', '.join(names)}." if names else " It is empty." if home.is_dir() else ""
    return f"no tokenizer there. Looked for {LOOKED_FOR}.{there} tokenizer=DIR names a directory that has one"


def _directories(home: Path, iteration: Path | None) -> list[Path]:
    """Where the files may lie."""
    if iteration is None:
        return [home]
    beside = home.resolve().parent if iteration == home else home
    return [home, *([beside] if beside != home else []), iteration / "tokenizer", iteration / _NEMO]


def _found_in(directory: Path, args: Mapping[str, Any]) -> Iterator[TokenizerSource]:
    if not directory.is_dir():
        return
    if (path := directory / "tokenizer.json").is_file():
        yield TokenizerSource((path,), _read_json)
    if (path := directory / "tokenizer.model").is_file():
        yield _of_model_file(path, args)
    else:
        models = sorted(each for each in directory.glob("*.model") if each.is_file())
        if len(models) == 1:
            yield _of_model_file(models[0], args)
    for path in sorted(directory.glob("*.tiktoken"))[:1]:
        yield TokenizerSource((path,), read_tiktoken_file)
    for path in sorted(directory.glob("*.json")):
        if _is_megatron_tiktoken(path):
            yield TokenizerSource((path,), read_megatron_tiktoken, _about_tiktoken(args))
            break
    for vocab, merges in _PAIRS:
        if (directory / vocab).is_file() and (directory / merges).is_file():
            yield TokenizerSource((directory / vocab, directory / merges), read_gpt2_files)
    ggufs = sorted(directory.glob("*.gguf"))
    if len(ggufs) == 1:
        yield TokenizerSource((ggufs[0],), _read_gguf)


def _named_by(args: Mapping[str, Any], home: Path) -> TokenizerSource | None:
    """The tokenizer that the arguments of a Megatron checkpoint name."""
    kind = args.get("tokenizer_type")
    if kind in _OF_GPT2:
        files = [_named_file(args, key, home) for key in ("vocab_file", "merge_file")]
        return TokenizerSource(tuple(files), read_gpt2_files)
    if kind in _OF_PIECES:
        return _of_model_file(_named_file(args, "tokenizer_model", home), args)
    if kind in _OF_TIKTOKEN:
        path = _named_file(args, "tokenizer_model", home)
        return TokenizerSource((path,), read_megatron_tiktoken, _about_tiktoken(args))
    if kind in _OF_HUGGING_FACE:
        stated = args.get("tokenizer_model")
        directory = Path(stated) if isinstance(stated, str) and "\0" not in stated else home
        found = list(_found_in(directory, {})) if directory != home and _is_directory(directory) else []
        if found:
            return found[0]
        raise CheckpointError(
            f"{home}: args.tokenizer_type={kind} names the tokenizer {shown(stated)}, which is not on this machine; "
            "put its tokenizer.json into the directory, or give tokenizer=DIR"
        )
    if kind is not None:
        raise CheckpointError(
            f"{home}: args.tokenizer_type={shown(kind)} cannot be read; "
            f"{', '.join((*_OF_HUGGING_FACE[:1], *_OF_GPT2, *_OF_PIECES, *_OF_TIKTOKEN))} can. tokenizer=DIR names a "
            "directory with the tokenizer to use"
        )
    return None


def _named_file(args: Mapping[str, Any], key: str, home: Path) -> Path:
    """The file as it was named in training, or one of its name in the directory."""
    stated = args.get(key)
    if isinstance(stated, str) and stated and "\0" not in stated:
        beside = [home.resolve().parent] if iteration_of(home) == home else []
        for path in (*(directory / Path(stated).name for directory in (home, *beside)), Path(stated)):
            if _is_file(path):
                return path
    raise CheckpointError(
        f"{home}: args.tokenizer_type={args['tokenizer_type']} was trained with {key}={shown(stated)}, which is not on "
        "this machine; copy the file into the directory, or give tokenizer=DIR"
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # of a name that is too long
        return False


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def _of_model_file(path: Path, args: Mapping[str, Any]) -> TokenizerSource:
    """Two kinds share the name: a SentencePiece model begins with its first piece, tiktoken's is text."""
    with open_regular(path) as file:
        is_pieces = file.read(1) == b"\n"
    begins = {"add_bos_token": True} if args.get("tokenizer_type") == "Llama2Tokenizer" else {}
    return TokenizerSource((path,), read_sentencepiece if is_pieces else read_tiktoken_file, begins)


def _is_megatron_tiktoken(path: Path) -> bool:
    if not path.is_file():
        return False
    with open_regular(path) as file:
        start = file.read(1024).lstrip()
    return start.startswith(b"[") and b'"token_bytes"' in start


def _about_tiktoken(args: Mapping[str, Any]) -> dict[str, Any]:
    return {key: args[key] for key in _TIKTOKEN_ARGS if isinstance(args.get(key), str | int | list)}


def _read_json(path: Path, settings: Mapping[str, Any]) -> ReadTokenizer:
    return ReadTokenizer(read_whole_tokenizer(path), dict(settings))


def _read_gguf(path: Path, settings: Mapping[str, Any]) -> ReadTokenizer:
    found = read_gguf_tokenizer(path)
    return found._replace(settings={**found.settings, **settings})
