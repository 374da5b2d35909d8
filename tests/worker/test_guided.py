"""Structured output where tokens are sampled: whatever the weights are, what comes out matches."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hypothesis
import msgspec
import pytest
import torch
from hypothesis import strategies as st

from megatron_medha.cluster.rank_config import RankConfig
from megatron_medha.core.batch import Chunk
from megatron_medha.core.sampling import Sampling
from megatron_medha.grammar.guidance import GrammarCompiler
from megatron_medha.model.draw import SamplingRow
from megatron_medha.model.sampler import Sampler
from megatron_medha.tiny.tiny_tokenizer import EOS_ID, VOCAB_SIZE, decode_bytes, save_tiny_tokenizer

llguidance = pytest.importorskip("llguidance")
PROMPT = list(b"Say it in JSON.")
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

# Bounded, so that the longest text fits into the tokens that an answer gets.
SCALARS = st.sampled_from([
    {"type": "boolean"}, {"type": "null"}, {"const": "so"}, {"enum": ["red", "green", 3, None]},
    {"type": "integer", "minimum": -20, "maximum": 300},
    {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 999},
    {"type": "string", "maxLength": 12}, {"type": "string", "pattern": "^[a-f]{2,4}-[0-9]{3}$"},
    {"type": "string", "format": "date"}, {"type": ["string", "integer"], "maxLength": 3, "minimum": 0, "maximum": 9},
])  # fmt: skip


def objects(inner: st.SearchStrategy[dict]) -> st.SearchStrategy[dict]:
    properties = st.dictionaries(st.sampled_from(["a", "name", "x y", 'q"q', "é"]), inner, max_size=3)
    return properties.map(lambda of: {
        "type": "object", "properties": of, "required": list(of)[:2], "additionalProperties": False,
    })  # fmt: skip


def arrays(inner: st.SearchStrategy[dict]) -> st.SearchStrategy[dict]:
    return inner.map(lambda items: {"type": "array", "items": items, "minItems": 1, "maxItems": 3})


def unions(inner: st.SearchStrategy[dict]) -> st.SearchStrategy[dict]:
    return st.lists(inner, min_size=1, max_size=3).map(lambda parts: {"anyOf": parts})


SCHEMAS = st.recursive(SCALARS, lambda inner: objects(inner) | arrays(inner) | unions(inner), max_leaves=4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights over bytes."""
    transformers = pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("bytes")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=4096, initializer_range=0.2, eos_token_id=EOS_ID,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).float().save_pretrained(directory)
    save_tiny_tokenizer(directory, 4096)
    return directory


@pytest.fixture(scope="module")
def bytes_front(checkpoint: Path, rank_config: RankConfig, front_of: Callable[[RankConfig], Any]) -> Any:
    return front_of(msgspec.structs.replace(rank_config, checkpoint=str(checkpoint)))


def of_schema(schema: dict) -> str:
    return llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), JSON_STYLE)


def of_regex(regex: str) -> str:
    return llguidance.LLMatcher.grammar_from_regex(regex)


def answer(front: Any, room: int = 1500, known: list[int] | None = None, **sampling: Any) -> list[int]:
    """Output until the stop token; `known` was there before, from another rank."""
    tokens = [*PROMPT, *(known or [])]
    new = front.new("a", tokens, num_prompt_tokens=len(PROMPT), stop_token_ids=(EOS_ID,), **sampling)
    done = front.step([front.first("a", len(tokens), room=room, samples=True)], [new])
    output = list(known or [])
    while True:
        assert not done.failed, done.failed
        output.append(done.tokens[0].token_id)
        if done.tokens[0].is_stop:
            break
        assert len(output) < room - len(PROMPT) - 1, decode_bytes(output)
        done = front.step([Chunk("a", len(PROMPT) + len(output) - 1, 1, True)])
    front.step(released=["a"])
    front.pool = type(front.pool)(front.ready.num_blocks)
    return output


@hypothesis.given(schema=SCHEMAS, seed=st.integers(0, 2**32))
@hypothesis.settings(
    max_examples=12,
    suppress_health_check=[
        *hypothesis.settings.default.suppress_health_check, hypothesis.HealthCheck.function_scoped_fixture
    ],
)  # fmt: skip
def test_random_weights_give_json_of_any_schema(bytes_front: Any, schema: dict, seed: int) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    output = answer(bytes_front, temperature=1.0, seed=seed, grammar=of_schema(schema))
    jsonschema.validate(json.loads(decode_bytes(output)), schema)


def test_a_regex_holds_whatever_the_temperature(bytes_front: Any) -> None:
    for temperature in (0.0, 1.0, 3.0):
        output = answer(bytes_front, temperature=temperature, seed=1, grammar=of_regex("[a-c]{3}x?[0-9]{2}"))
        assert output[-1] == EOS_ID
        assert len(text := decode_bytes(output)) in (5, 6) and set(text[:3]) <= set("abc"), text


def test_greedy_output_is_the_same_after_a_ranks_death(bytes_front: Any) -> None:
    grammar = of_schema({"type": "array", "items": {"type": "integer", "minimum": 100, "maximum": 999}, "maxItems": 6,
                         "minItems": 3})  # fmt: skip
    whole = answer(bytes_front, grammar=grammar)
    for num_known in (1, 7, len(whole) - 2):
        assert answer(bytes_front, known=whole[:num_known], grammar=grammar) == whole


def test_who_has_no_grammar_gets_what_it_gets_alone(bytes_front: Any) -> None:
    front = bytes_front
    alone = front.generate("free", PROMPT, 6, temperature=1.0, seed=5)
    guided = front.new("guided", PROMPT, grammar=of_regex("[0-9]{20}"))
    free = front.new("free", PROMPT, temperature=1.0, seed=5)
    first = [front.first(name, len(PROMPT), room=40, samples=True) for name in ("guided", "free")]
    done = [front.step(first, [guided, free])]
    for place in range(5):
        chunks = [Chunk(name, len(PROMPT) + place, 1, True) for name in ("guided", "free")]
        done.append(front.step(chunks))
    front.step(released=["guided", "free"])
    assert [step.tokens[1].token_id for step in done] == alone
    assert decode_bytes([step.tokens[0].token_id for step in done]).isdigit()


def test_a_grammar_that_turns_out_to_be_too_much_ends_its_request_alone(bytes_front: Any) -> None:
    front = bytes_front
    bad = front.new("bad", PROMPT, grammar=of_regex("(a"))
    good = front.new("good", PROMPT)
    chunks = [front.first(name, len(PROMPT), room=40, samples=True) for name in ("bad", "good")]
    done = front.step(chunks, [bad, good])
    assert [token.request_id for token in done.tokens] == ["good"]
    ((request_id, why),) = done.failed
    assert request_id == "bad" and why.startswith("structured output: ") and "unclosed group" in why
    front.step(released=["bad", "good"])


def test_a_mask_changes_the_choice_and_not_the_log_probabilities() -> None:
    sampler = Sampler(8, "cpu")
    logits_RV = torch.arange(16, dtype=torch.float32).reshape(2, 8)
    sampling = Sampling(max_output_tokens=1, temperature=0.0, num_logprobs=1)
    rows = [SamplingRow(sampling, torch.tensor([1]), [], 0, 0)] * 2
    allowed_V = torch.zeros(8, dtype=torch.bool)
    allowed_V[3] = True
    free, _ = sampler.sample(logits_RV, rows)
    masked, other = sampler.sample(logits_RV, rows, {0: allowed_V})
    assert free is not None and masked is not None and other is not None
    assert (free.token_id, masked.token_id, other.token_id) == (7, 3, 7)
    assert masked.logprobs is not None and free.logprobs is not None
    assert masked.logprobs.top == free.logprobs.top and masked.logprobs.rank == 5


def test_a_grammar_that_was_prepared_is_not_compiled_for_its_request(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = GrammarCompiler.of_checkpoint(checkpoint, VOCAB_SIZE, (EOS_ID,))
    compiler.prepare(of_regex("[0-9]{3}"))
    monkeypatch.setattr(compiler, "compile", lambda grammar: pytest.fail("compiled again"))
    assert any(compiler.matcher(of_regex("[0-9]{3}")).compute_bitmask())


def test_while_a_grammar_is_prepared_others_get_what_is_kept(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = GrammarCompiler.of_checkpoint(checkpoint, VOCAB_SIZE, (EOS_ID,))
    kept = compiler.compile(of_regex("[a-z]"))
    compiler.prepare(of_regex("[0-9]"))
    has_begun, may_end = threading.Event(), threading.Event()

    def slow(grammar: str) -> Any:
        has_begun.set()
        may_end.wait()
        return kept

    monkeypatch.setattr(compiler, "compile", slow)
    with ThreadPoolExecutor() as threads:
        try:
            preparing = threads.submit(compiler.prepare, of_regex("[a-z]"))
            has_begun.wait()
            threads.submit(compiler.matcher, of_regex("[0-9]")).result(timeout=60)
            assert not preparing.done()
        finally:
            may_end.set()
