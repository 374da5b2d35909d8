"""A Llama of random weights in Hugging Face layout, the same for every server: speed does not depend on the values."""

from __future__ import annotations

from pathlib import Path

VOCAB_SIZE = 4096
MAX_CONTEXT_LEN = 131072


def make_checkpoint(directory: Path, seed: int = 0) -> None:
    """28 million parameters in bf16: 8 layers of 512, 8 heads over 2 of 64. Attention outweighs the rest from 3K on."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    # One merge, as llama.cpp refuses a vocabulary without any.
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "aa"]
    backend = Tokenizer(models.BPE(vocab={text: index for index, text in enumerate(letters)}, merges=[("a", "a")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>"), AddedToken("</s>")])
    backend.add_tokens([f"<{index}>" for index in range(VOCAB_SIZE - backend.get_vocab_size())])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", model_max_length=MAX_CONTEXT_LEN
    )
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_CONTEXT_LEN,
        rope_theta=500000.0,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    # Servers that lack ignore_eos must not stop early, and none may hold back half a character: single bytes and
    # special tokens are never the best.
    model.lm_head.weight.data[: len(letters) + 2] = 0.0
    model.lm_head.weight.data[len(letters) + 2 :] *= 6.0
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
