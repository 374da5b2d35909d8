"""Llamas of random weights as Hugging Face directories: for timings, as speed does not depend on the values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VOCAB_SIZE = 4096            # of the small model
MAX_CONTEXT_LEN = 131072


def save_llama(
    directory: Path, *, hidden_size: int, ffn_size: int, num_layers: int, num_heads: int, num_kv_heads: int,
    head_dim: int, vocab_size: int = 1024, initializer_range: float = 0.02,
) -> None:  # fmt: skip
    """A model of this shape in fp32, small enough in its numbers that nothing overflows; without a tokenizer.

    initializer_range: 0.2 gives logits with spread, so that the best two are seldom close.
    """
    _llama(
        vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=ffn_size, num_hidden_layers=num_layers,
        num_attention_heads=num_heads, num_key_value_heads=num_kv_heads, head_dim=head_dim,
        max_position_embeddings=1 << 20, bos_token_id=1, eos_token_id=2, initializer_range=initializer_range,
    ).save_pretrained(directory)  # fmt: skip


def save_word_tokenizer(directory: Path, vocab_size: int) -> None:
    """A tokenizer for servers that are sent ids alone: one word per id."""
    tokens = {f"t{i}": i for i in range(vocab_size)}
    model = {"type": "WordLevel", "vocab": tokens, "unk_token": "t0"}
    content: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None, "model": model,
    }
    (directory / "tokenizer.json").write_text(json.dumps(content))
    (directory / "tokenizer_config.json").write_text("{}")


SESSION_MODEL = {
    "hidden_size": 256, "ffn_size": 688, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64
}  # fmt: skip


def session_checkpoint(directory: Path) -> Path:
    """SESSION_MODEL, for long sessions on a CPU; saved if it is not there."""
    if not (directory / "tokenizer.json").is_file():
        save_llama(directory, **SESSION_MODEL)
        save_word_tokenizer(directory, 1024)
    return directory


def save_small_model(directory: Path) -> None:
    """28 million parameters in bf16 and a tokenizer that every server reads.

    8 layers of 512, 8 heads over 2 of 64: attention outweighs the rest from 3K tokens on.
    """
    save_served_llama(
        directory, hidden_size=512, ffn_size=1536, num_layers=8, num_heads=8, num_kv_heads=2, head_dim=64
    )


def save_served_llama(
    directory: Path, *, hidden_size: int, ffn_size: int, num_layers: int, num_heads: int, num_kv_heads: int,
    head_dim: int, vocab_size: int = VOCAB_SIZE, is_tied: bool = False,
) -> None:  # fmt: skip
    """A model of this shape in bf16 and a tokenizer that every server reads."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # One merge, as llama.cpp refuses a vocabulary without any.
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "aa"]
    num_special = 2
    # Those beyond the small model's are plain entries: so many added tokens take minutes to load.
    num_plain = max(0, vocab_size - VOCAB_SIZE)
    texts = [*letters, *(f"<+{index}>" for index in range(num_plain))]
    backend = Tokenizer(models.BPE(vocab={text: index for index, text in enumerate(texts)}, merges=[("a", "a")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>"), AddedToken("</s>")])
    backend.add_tokens([f"<{index}>" for index in range(vocab_size - backend.get_vocab_size())])
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", model_max_length=MAX_CONTEXT_LEN
    )
    model = _llama(
        vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=ffn_size, num_hidden_layers=num_layers,
        num_attention_heads=num_heads, num_key_value_heads=num_kv_heads, head_dim=head_dim,
        max_position_embeddings=MAX_CONTEXT_LEN, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=is_tied,
    )  # fmt: skip
    # Servers that lack ignore_eos must not stop early, and none may hold back half a character: single bytes and
    # special tokens are never the best.
    weights = model.lm_head.weight.data
    weights[: len(letters)] = 0.0
    weights[len(texts) : len(texts) + num_special] = 0.0
    weights[len(letters) :] *= 6.0
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _llama(*, tie_word_embeddings: bool = False, **options: Any) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(rope_theta=500000.0, tie_word_embeddings=tie_word_embeddings, **options)
    return LlamaForCausalLM(config)
