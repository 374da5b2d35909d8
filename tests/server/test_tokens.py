"""Text to tokens and back, in whole and token by token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from running_server import byte_tokenizer_backend
from tokenizers import decoders, models, pre_tokenizers, processors

from megatron_medha.core.errors import CheckpointError
from megatron_medha.text.chat.chat_template import ChatTemplate, ChatTemplateError
from megatron_medha.text.detokenizer import make_detokenizer
from megatron_medha.text.tokenizer import PieceKind, Tokenizer, TokenizerConfig

BYTES = Tokenizer(byte_tokenizer_backend(), TokenizerConfig(bos_token="<s>", eos_token="</s>"))


def sentencepiece_like() -> Tokenizer:
    """Byte fallback and a mark for spaces, as Llama 2 and Mistral have it."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁the": 256, "▁": 257, "cat": 258, "<unk>": 259}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(backend, TokenizerConfig())


def wordpiece() -> Tokenizer:
    """A decoder that only the library knows."""
    vocab = {"[UNK]": 0, "the": 1, "cat": 2, "##s": 3, "caf": 4, "##é": 5}
    backend = tokenizers.Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    return Tokenizer(backend, TokenizerConfig())


def characters() -> Tokenizer:
    """One character a token, nothing else."""
    vocab = {char: place for place, char in enumerate("abc é€😀")}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.decoder = decoders.Fuse()
    return Tokenizer(backend, TokenizerConfig())


def in_pieces(
    tokenizer: Tokenizer, token_ids: list[int], prompt: list[int] | None = None, skip: bool = True
) -> list[str]:
    detokenizer = make_detokenizer(tokenizer, prompt or [], skip_special_tokens=skip)
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.finish()]


def test_no_piece_of_text_holds_half_a_character() -> None:
    assert in_pieces(BYTES, list("é€".encode())) == ["", "é", "", "", "€", ""]


def test_a_character_that_stays_incomplete_is_replaced_at_the_end() -> None:
    assert in_pieces(BYTES, [0xE2, 0x82]) == ["", "", "\N{REPLACEMENT CHARACTER}"]


def test_special_tokens_are_left_out_unless_wanted() -> None:
    assert "".join(in_pieces(BYTES, [104, 256, 105])) == "hi"
    assert "".join(in_pieces(BYTES, [104, 256, 105], skip=False)) == "h<s>i"


def test_ids_beyond_the_tokenizer_have_no_text() -> None:
    assert in_pieces(BYTES, [104, 299, 105]) == ["h", "", "i", ""]


@settings(max_examples=200)
@given(token_ids=st.lists(st.one_of(st.integers(0, 257), st.sampled_from(list("é€😀".encode()))), max_size=40))
def test_pieces_add_up_to_the_text_of_the_whole(token_ids: list[int]) -> None:
    assert "".join(in_pieces(BYTES, token_ids)) == BYTES.decode(token_ids)


@given(token_ids=st.lists(st.integers(0, 6), max_size=20))
def test_pieces_add_up_for_a_character_tokenizer(token_ids: list[int]) -> None:
    tokenizer = characters()
    assert tokenizer.kind is PieceKind.PIECES
    assert "".join(in_pieces(tokenizer, token_ids)) == tokenizer.decode(token_ids)


def test_byte_fallback_tokens_wait_for_each_other_and_spaces_survive() -> None:
    tokenizer = sentencepiece_like()
    assert tokenizer.kind is PieceKind.PIECES
    assert in_pieces(tokenizer, [256, 257, 258, 0xC3, 0xA9]) == [" the", " ", "cat", "", "é", ""]


def test_an_unknown_kind_of_decoder_is_asked_for_windows() -> None:
    tokenizer = wordpiece()
    assert tokenizer.kind is PieceKind.OTHER
    assert in_pieces(tokenizer, [2, 3, 1, 4, 5], prompt=[1]) == [" cat", "s", " the", " caf", "é", ""]


def test_torn_tokens_have_names_that_differ() -> None:
    assert BYTES.token_name(0xE2) == "bytes:\\xe2"
    assert BYTES.token_name(0xE3) == "bytes:\\xe3"
    assert BYTES.token_name(104) == "h"
    assert BYTES.token_name(256) == "<s>"


def test_bos_comes_from_the_configuration() -> None:
    backend = byte_tokenizer_backend()
    assert Tokenizer(backend, TokenizerConfig(bos_token="<s>")).encode("a").tolist() == [97]
    adds = Tokenizer(backend, TokenizerConfig(bos_token="<s>", add_bos_token=True))
    assert adds.encode("a").tolist() == [256, 97]
    assert adds.encode("<s>a").tolist() == [256, 97]
    assert adds.encode("a", add_special_tokens=False).tolist() == [97]


def test_bos_comes_from_the_post_processor_once() -> None:
    backend = byte_tokenizer_backend()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    for add_bos, expected in ((None, [256, 97]), (True, [256, 97]), (False, [97])):
        tokenizer = Tokenizer(backend, TokenizerConfig(bos_token="<s>", add_bos_token=add_bos))
        assert tokenizer.encode("a").tolist() == expected


def test_a_byte_level_tokenizer_bounds_token_counts_from_below() -> None:
    assert BYTES.min_num_tokens("x" * 4000) == 1000  # </s> is its longest entry
    assert characters().min_num_tokens("x" * 4000) == 1000  # its normalizer may make one of four characters


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer there.*It is empty"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_a_broken_file_is_named(tmp_path: Path, tokenizer_dir: Path, name: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    (tmp_path / name).write_text('{"half": ')
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        Tokenizer.load(tmp_path)


def test_a_broken_chat_template_stops_the_start(tmp_path: Path, tokenizer_dir: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(CheckpointError, match="line 1"):
        Tokenizer.load(tmp_path)


def test_the_template_file_wins_and_named_templates_have_a_default(tmp_path: Path, tokenizer_dir: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert Tokenizer.load(tmp_path).template.render([]) == "D"
    (tmp_path / "chat_template.jinja").write_text("J")
    assert Tokenizer.load(tmp_path).config.chat_template == "J"


USER = [{"role": "user", "content": "hi"}]
DEFAULT = "{% for m in messages %}\n  {% if true %}\n{{ m.content }} \n{% endif %}{% endfor %}\n D \n\n"
WITH_TOOLS = "\n  {% for t in tools %}\n{{ t.function.name }}\n{% endfor %}T\n"
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize("way", ["string", "list", "files", "file and folder"])
@pytest.mark.parametrize("tools", [[], TOOLS])
def test_of_named_templates_the_one_of_transformers_is_used(
    way: str, tools: list[dict[str, Any]], tmp_path: Path, tokenizer_dir: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    named = [{"name": "default", "template": DEFAULT}, {"name": "tool_use", "template": WITH_TOOLS}]
    configured = {"string": DEFAULT, "list": named, "files": named, "file and folder": "C"}[way]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": configured}))
    if "file" in way:
        (tmp_path / "chat_template.jinja").write_text("J{{ messages[0].content }}\n\n")
    if way == "file and folder":
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(WITH_TOOLS)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(USER, tools=tools or None, tokenize=False)
    assert Tokenizer.load(tmp_path).template.render(USER, tools=tools, add_generation_prompt=False) == expected


def test_without_a_default_template_chats_are_refused(tmp_path: Path, tokenizer_dir: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    named = [{"name": "tool_use", "template": "T"}, {"name": "rag", "template": "R"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    template = Tokenizer.load(tmp_path).template
    assert template.render(USER, tools=TOOLS) == "T"
    with pytest.raises(ChatTemplateError, match="rag, tool_use none is the default"):
        template.render(USER)


def test_without_a_template_roles_are_written_out() -> None:
    template = ChatTemplate(None, {})
    assert template.render(USER) == "user: hi\nassistant:"
    assert template.render(USER, add_generation_prompt=False) == "user: hi\n"


def test_templates_have_what_checkpoints_expect_of_them() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{% endfor %}"
        "{% generation %}{{ {'a': '<é>'} | tojson }}{% endgeneration %}{{ strftime_now('%%') }}{{ extra }}"
    )
    assert ChatTemplate(source, {"bos_token": "<s>"}).render(USER, extra={"extra": 1}) == '<s>{"a": "<é>"}%1'


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[9].content.x }}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_template_that_fails_or_reaches_for_python_refuses_the_messages(source: str) -> None:
    with pytest.raises(ChatTemplateError, match="the chat template refuses"):
        ChatTemplate(source, {}).render(USER)


def test_the_final_message_can_be_continued() -> None:
    source = "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}"
    messages = [*USER, {"role": "assistant", "content": "Well, "}]
    text = ChatTemplate(source, {}).render(messages, add_generation_prompt=False, continue_final_message=True)
    assert text == "[user]hi[end][assistant]Well, "
