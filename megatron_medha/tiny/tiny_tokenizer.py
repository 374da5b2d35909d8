"""The tokenizer of the tiny model: one id per byte, and a few special tokens, in Hugging Face's files.

Ids 0 to 255 are the bytes themselves, so training needs no tokenizer.
"""

from __future__ import annotations

import json
from pathlib import Path

from megatron_medha.text.text_slices import CHAR_OF_BYTE

NUM_BYTES = 256
SPECIAL_TOKENS = (
    "<|bos|>", "<|eos|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|reserved|>",
)  # fmt: skip
VOCAB_SIZE = NUM_BYTES + len(SPECIAL_TOKENS)
EOS_ID = NUM_BYTES + SPECIAL_TOKENS.index("<|eos|>")
USER_ID = NUM_BYTES + SPECIAL_TOKENS.index("<|user|>")
ASSISTANT_ID = NUM_BYTES + SPECIAL_TOKENS.index("<|assistant|>")

# A role's token, the text, the end token: also how the training text writes conversations.
# Tools are only named: a model of this size calls them where it is made to.
CHAT_TEMPLATE = (
    "{%- if tools -%}{{- '<|system|>Tools: ' + (tools | tojson) -}}"
    "{{- ' Call one as <tool_call>{\"name\": ..., \"arguments\": {...}}</tool_call><|eos|>' -}}{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] in ['user', 'assistant', 'tool'] -%}{{- '<|' + message['role'] + '|>' -}}"
    "{%- else -%}{{- '<|system|>' -}}{%- endif -%}"
    "{{- message['content'] or '' -}}"
    "{%- for call in message['tool_calls'] or [] -%}"
    "{{- '<tool_call>' + (call['function'] | tojson) + '</tool_call>' -}}{%- endfor -%}"
    "{{- '<|eos|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def save_tiny_tokenizer(directory: Path, max_context_len: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json into the directory."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = {character: byte for byte, character in enumerate(CHAR_OF_BYTE)}
    vocab |= {token: NUM_BYTES + index for index, token in enumerate(SPECIAL_TOKENS)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    # use_regex stays on: it cuts the text into words, and without words a long prompt would be one of a million bytes.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "pad_token": "<|pad|>",
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_context_len,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS_ID}, indent=2) + "\n")


def decode_bytes(token_ids: list[int]) -> str:
    """Text of byte ids; special tokens are left out, bytes that are no UTF-8 become replacement characters."""
    return bytes(token_id for token_id in token_ids if token_id < NUM_BYTES).decode("utf-8", errors="replace")
