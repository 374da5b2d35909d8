"""Tokens named beside tokenizer.json have the ids of transformers: in the server, in grammars and for the model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from megatron_medha.core.errors import CheckpointError
from megatron_medha.models.model_config import ModelConfig
from megatron_medha.models.tokenizer_facts import tokenizer_facts, with_end_tokens_of
from megatron_medha.text.tokenizer import Tokenizer
from megatron_medha.text.tokenizers.added_tokens import read_whole_tokenizer

transformers = pytest.importorskip("transformers")

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
NUM_IDS = len(ALPHABET) + 3  # <s>, </s> and "hi"
START, END = "<|im_start|>", "<|im_end|>"
TEXTS = (
    "<|im_start|>user\nhi<|im_end|>", "a <|im_end|> b", "hi  <|im_end|>\n", "<s>hi</s>", "<tool> hi<tool>hi",
    "[PAD]x<|audio|>", "x <mask> y", "", "<|im_start|><|im_start|>",
)  # fmt: skip


def token(content: str, **flags: bool) -> dict[str, Any]:
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    return {"content": content, **plain, **flags}


def numbered(*tokens: dict[str, Any], begin: int = NUM_IDS) -> dict[str, Any]:
    return {str(begin + place): value for place, value in enumerate(tokens)}


def typed(content: str) -> dict[str, Any]:
    return {"__type": "AddedToken", **token(content)}


IM = numbered(token(START), token(END))
OWN = {str(NUM_IDS - 3): token("<s>"), str(NUM_IDS - 2): token("</s>")}
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {},
    "no config": {"tokenizer_config.json": {"DELETE": True}},
    "added_tokens_decoder": {"tokenizer_config.json": {"added_tokens_decoder": IM, "eos_token": END}},
    "added_tokens_decoder with those of tokenizer.json": {
        "tokenizer_config.json": {"added_tokens_decoder": {**OWN, **IM}, "eos_token": END}
    },
    "added_tokens_decoder out of order": {
        "tokenizer_config.json": {"added_tokens_decoder": dict(reversed(IM.items())), "eos_token": "</s>"}
    },
    "added_tokens_decoder, not special": {
        "tokenizer_config.json": {"added_tokens_decoder": numbered(token("<tool>", special=False))}
    },
    "added_tokens_decoder, not special but named": {
        "tokenizer_config.json": {
            "added_tokens_decoder": numbered(token("<tool>", special=False)), "pad_token": "<tool>",
        }
    },
    "added_tokens_decoder, stripping": {
        "tokenizer_config.json": {"added_tokens_decoder": numbered(token("<mask>", lstrip=True, rstrip=True))}
    },
    "added_tokens_decoder, whole words": {
        "tokenizer_config.json": {"added_tokens_decoder": numbered(token("hi", single_word=True), begin=NUM_IDS - 1)}
    },
    "other flags for one of tokenizer.json": {
        "tokenizer_config.json": {"added_tokens_decoder": {str(NUM_IDS - 2): token("</s>", lstrip=True)}}
    },
    "additional_special_tokens": {"tokenizer_config.json": {"additional_special_tokens": [START, END]}},
    "extra_special_tokens": {"tokenizer_config.json": {"extra_special_tokens": [START, END]}},
    "extra_special_tokens by name": {
        "tokenizer_config.json": {"extra_special_tokens": {"audio_token": "<|audio|>", "tool_token": "<tool>"}}
    },
    "both lists": {
        "tokenizer_config.json": {"extra_special_tokens": [START], "additional_special_tokens": [END]}
    },
    "extra_special_tokens with flags": {"tokenizer_config.json": {"extra_special_tokens": [typed(START)]}},
    "named tokens": {
        "tokenizer_config.json": {"bos_token": START, "eos_token": END, "pad_token": "[PAD]", "mask_token": "<mask>"}
    },
    "a named token of the vocabulary": {"tokenizer_config.json": {"eos_token": "hi"}},
    "named tokens with flags": {"tokenizer_config.json": {"eos_token": typed(END), "bos_token": typed("<s>")}},
    "tokens of a model's own": {"tokenizer_config.json": {"audio_token": "<|audio|>", "image_token": "<tool>"}},
    "null tokens": {"tokenizer_config.json": {"pad_token": None, "unk_token": None, "eos_token": "</s>"}},
    "special_tokens_map.json": {
        "special_tokens_map.json": {"eos_token": END, "pad_token": token("[PAD]"), "bos_token": "<s>"}
    },
    "special_tokens_map.json before the config": {
        "tokenizer_config.json": {"eos_token": "</s>"}, "special_tokens_map.json": {"eos_token": END}
    },
    "special_tokens_map.json beside added_tokens_decoder": {
        "tokenizer_config.json": {"added_tokens_decoder": IM, "eos_token": "</s>"},
        "special_tokens_map.json": {"eos_token": END, "pad_token": "[PAD]"},
    },
    "special_tokens_map.json with a list": {
        "special_tokens_map.json": {"eos_token": "</s>", "extra_special_tokens": [START, END]}
    },
    "added_tokens.json": {"added_tokens.json": {START: NUM_IDS, END: NUM_IDS + 1}},
    "added_tokens.json out of order": {"added_tokens.json": {END: NUM_IDS + 1, START: NUM_IDS}},
    "added_tokens.json, one named": {
        "added_tokens.json": {START: NUM_IDS, END: NUM_IDS + 1}, "tokenizer_config.json": {"eos_token": END}
    },
    "added_tokens.json beside added_tokens_decoder": {
        "added_tokens.json": {"<tool>": NUM_IDS + 2}, "tokenizer_config.json": {"added_tokens_decoder": IM}
    },
    "split_special_tokens": {
        "tokenizer_config.json": {"split_special_tokens": True, "additional_special_tokens": [END]}
    },
    "add_bos_token": {"tokenizer_config.json": {"add_bos_token": True, "bos_token": "<s>"}},
    "add_eos_token": {"tokenizer_config.json": {"add_eos_token": True, "eos_token": "</s>"}},
    "no bos beside a post-processor": {
        "tokenizer_config.json": {"add_bos_token": False, "bos_token": "<s>"}, "tokenizer.json": {"adds_bos": True}
    },
    "bos of the post-processor": {"tokenizer_config.json": {"bos_token": "<s>"}, "tokenizer.json": {"adds_bos": True}},
}  # fmt: skip


def save(directory: Path, files: dict[str, dict[str, Any]]) -> Path:
    """A byte-level BPE tokenizer with these files beside it."""
    vocab = {char: place for place, char in enumerate(ALPHABET)} | {"hi": NUM_IDS - 1}
    vocab |= {"<s>": NUM_IDS - 3, "</s>": NUM_IDS - 2}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("h", "i")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.add_special_tokens(["<s>", "</s>"])
    if files.get("tokenizer.json", {}).get("adds_bos"):
        single = [("<s>", NUM_IDS - 3)]
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=single)
    backend.save(str(directory / "tokenizer.json"))
    base = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, content in {"tokenizer_config.json": {}, **files}.items():
        if name != "tokenizer.json":
            content = {**base, **content} if name == "tokenizer_config.json" else content
            (directory / name).write_text(json.dumps(content))
    if files.get("tokenizer_config.json", {}).get("DELETE"):
        (directory / "tokenizer_config.json").unlink()
    return directory


@pytest.mark.parametrize("name", CASES)
def test_texts_have_the_tokens_of_transformers(name: str, tmp_path: Path) -> None:
    ours = Tokenizer.load(save(tmp_path, CASES[name]))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = ours.encode(text).tolist()
        assert ids == theirs(text)["input_ids"], text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
        bare = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, add_special_tokens=False).tolist() == bare
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize("name", CASES)
def test_grammars_and_the_model_know_the_same_tokens(name: str, tmp_path: Path) -> None:
    ours = Tokenizer.load(save(tmp_path, CASES[name]))
    whole = tokenizers.Tokenizer.from_str(read_whole_tokenizer(tmp_path / "tokenizer.json"))
    assert whole.get_vocab() == tokenizers.Tokenizer.from_str(ours.as_json()).get_vocab()
    num_ids, end_ids = tokenizer_facts(tmp_path)
    assert num_ids == ours.vocab_size
    assert end_ids == (() if ours.eos_token_id is None else (ours.eos_token_id,))


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"tokenizer_config.json": {"added_tokens_decoder": numbered(token(END), begin=NUM_IDS + 5)}}, END[2:-2]),
        ({"added_tokens.json": {END: NUM_IDS + 5}}, END[2:-2]),
        ({"tokenizer_config.json": {"added_tokens_decoder": [1]}}, "added_tokens_decoder"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"x": token(END)}}}, "'x'"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"300": 5}}}, "tokenizer_config.json: 5"),
        ({"tokenizer_config.json": {"eos_token": {"content": 5}}}, "tokenizer_config.json"),
        ({"added_tokens.json": {END: "x"}}, "added_tokens.json"),
    ],
)
def test_tokens_that_cannot_be_added_are_named(files: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=told):
        Tokenizer.load(save(tmp_path, files))


def test_end_tokens_of_the_generation_config_come_with_the_tokenizers_own(tmp_path: Path) -> None:
    save(tmp_path, {"tokenizer_config.json": {"eos_token": END}})
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    assert tokenizer_facts(tmp_path)[1] == (3, 4, NUM_IDS)


def test_the_end_token_of_a_tokenizer_elsewhere_ends_outputs_if_the_model_has_it(tmp_path: Path) -> None:
    save(tmp_path, {"tokenizer_config.json": {"eos_token": END}})
    config = ModelConfig(
        name="small", num_layers=1, hidden_size=8, ffn_hidden_size=8, num_heads=1, num_kv_heads=1, head_dim=8,
        vocab_size=NUM_IDS + 1, max_context_len=16, norm_epsilon=1e-6, rope_theta=1e4, stop_token_ids=(3,),
    )  # fmt: skip
    assert with_end_tokens_of(config, str(tmp_path)).stop_token_ids == (3, NUM_IDS)
    smaller = dataclasses.replace(config, vocab_size=NUM_IDS)
    assert with_end_tokens_of(smaller, str(tmp_path)) == smaller
    assert with_end_tokens_of(config, None) == config
