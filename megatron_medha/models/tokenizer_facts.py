"""What a model must know of the tokenizer beside it: how many ids there are, and which of them end an output."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megatron_medha.core.errors import CheckpointError
from megatron_medha.models.model_config import ModelConfig
from megatron_medha.safe_files.json_fields import JsonFields, read_json
from megatron_medha.text.tokenizers.added_tokens import token_name
from megatron_medha.text.tokenizers.tokenizer_file import token_ids
from megatron_medha.text.tokenizers.tokenizer_source import find_tokenizer, read_tokenizer


def tokenizer_facts(home: Path) -> tuple[int | None, tuple[int, ...]]:
    """How many ids the tokenizer of the checkpoint there has, and its end tokens; (None, ()) without one.

    End tokens are those of generation_config.json and the tokenizer's own, as in vLLM.
    """
    source = None
    try:
        if (source := find_tokenizer(home)) is None:
            return None, ()
        found = read_tokenizer(source)
    except CheckpointError:
        # Another tokenizer may be used with it (tokenizer=DIR). Where none is, the API server gives the reason.
        if source is None or source.files[0].name != "tokenizer.json":
            return None, ()
        raise
    ids = token_ids(found.content, source.files[0])
    stops = list(generation_end_ids(source.directory))
    end = token_name(found.settings.get("eos_token"))
    if end in ids:
        stops.append(ids[end])
    return max(ids.values(), default=-1) + 1, tuple(dict.fromkeys(stops))


def with_end_tokens_of(config: ModelConfig, tokenizer: str | None) -> ModelConfig:
    """That model with the end tokens of a tokenizer in another directory too; as it is without one."""
    if tokenizer is None:
        return config
    ends = (end for end in tokenizer_facts(Path(tokenizer))[1] if end < config.vocab_size)
    return dataclasses.replace(config, stop_token_ids=tuple(dict.fromkeys((*config.stop_token_ids, *ends))))


def generation_end_ids(directory: Path) -> tuple[int, ...]:
    """The end tokens of generation_config.json; none without one."""
    path = directory / "generation_config.json"
    return end_ids(read_json(path)) if path.is_file() else ()


def end_ids(fields: JsonFields) -> tuple[int, ...]:
    """The end tokens that a config states. Raises CheckpointError when they are no ids."""
    value = fields.fields.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token_id, int) and not isinstance(token_id, bool) for token_id in ids):
        raise fields.wrong("eos_token_id", "a token id or a list of them")
    return tuple(token_id for token_id in ids if token_id >= 0)  # -1 is written for none
