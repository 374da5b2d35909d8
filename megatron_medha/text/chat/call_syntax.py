"""How chat models write calls of tools: one row per syntax. Reading them is tool_calls' part."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum


class ToolSyntax(Enum):
    """How calls are written in the text of an output."""

    HERMES = "hermes"            # <tool_call>{"name": ..., "arguments": {...}}</tool_call>: Hermes, Qwen, Granite 4
    QWEN_XML = "qwen_xml"        # <tool_call><function=...><parameter=...>: Qwen3-Coder, Qwen 3.5, Nemotron 3
    SEED = "seed"                # the same in <seed:tool_call>: Seed-OSS
    LLAMA3_JSON = "llama3_json"  # {"name": ..., "parameters": {...}}; ...: Llama 3.1 and later
    PYTHONIC = "pythonic"        # [f(a=1), g()]: Llama 4 and 3.2, LFM2, Olmo 3
    MISTRAL = "mistral"          # [TOOL_CALLS][{"name": ..., "arguments": {...}}], or [TOOL_CALLS]name[ARGS]{...}
    DEEPSEEK = "deepseek"        # <｜tool▁call▁begin｜>name<｜tool▁sep｜>{...}: DeepSeek V3, R1, V3.1
    DEEPSEEK_DSML = "deepseek_dsml"  # <｜DSML｜function_calls><｜DSML｜invoke name=...>: DeepSeek V3.2
    GLM = "glm"                  # <tool_call>name<arg_key>...</arg_key><arg_value>...: GLM 4.5 and later
    KIMI = "kimi"                # <|tool_calls_section_begin|><|tool_call_begin|>functions.name:0...: Kimi K2
    MINIMAX = "minimax"          # <minimax:tool_call><invoke name=...><parameter name=...>: MiniMax M2
    GRANITE = "granite"          # <|tool_call|>[{"name": ..., "arguments": {...}}]: Granite 3, Phi-4-mini
    COHERE = "cohere"            # <|START_ACTION|>[{"tool_name": ..., "parameters": {...}}]<|END_ACTION|>: Command
    JAMBA = "jamba"              # <tool_calls>[{...}]</tool_calls>: Jamba, Hunyuan, Apriel, MiniMax M1
    NEMOTRON = "nemotron"        # <TOOLCALL>[{...}]</TOOLCALL>: Nemotron Nano 2
    LIST = "list"                # [{"name": ..., "arguments": {...}}, ...]: what we guide an output to
    ARGUMENTS = "arguments"      # {...}: the arguments of the one tool that must be called


@dataclass(frozen=True, slots=True, kw_only=True)
class Tags:
    """One call as tags around its parameters."""

    start: str                 # how it begins; empty where that is its name
    head: re.Pattern[str]      # group 1 is the name
    head_so_far: re.Pattern[str]  # what may become a head
    parameter_start: str
    parameter: re.Pattern[str]    # group 1 is the parameter's name, `is_string` whether its value is text
    parameter_so_far: re.Pattern[str]
    parameter_end: str
    end: str
    pads_values: bool = False     # a value stands on lines of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """Where calls stand in a text, and how each is written. A call as a JSON object is understood in all of them."""

    openings: tuple[str, ...] = ()
    closings: tuple[str, ...] = ()
    between: tuple[str, ...] = ()        # around single calls: passed over
    within: tuple[str, ...] = ()         # inside of a call
    is_bare: bool = False                # an output may begin with a call, without any mark
    tags: Tags | None = None
    head: re.Pattern[str] | None = None  # before a call's arguments as JSON; group 1 is the name
    head_so_far: re.Pattern[str] | None = None
    is_python: bool = False


_FUNCTION_TAGS = Tags(
    start="<function=", head=re.compile(r"<function=[ \t]*([^<>\n]+?)[ \t]*>"),
    head_so_far=re.compile(r"<function=[^<>\n]*"), parameter_start="<parameter=",
    parameter=re.compile(r"<parameter=[ \t]*([^<>\n]+?)[ \t]*>"), parameter_so_far=re.compile(r"<parameter=[^<>\n]*"),
    parameter_end="</parameter>", end="</function>", pads_values=True,
)  # fmt: skip
_INVOKE_TAGS = Tags(
    start="<invoke", head=re.compile(r'<invoke[ \t]+name="([^"<>\n]+)"[ \t]*>'),
    head_so_far=re.compile(r"<invoke[^<>\n]*"), parameter_start="<parameter",
    parameter=re.compile(r'<parameter[ \t]+name="([^"<>\n]+)"[ \t]*>'),
    parameter_so_far=re.compile(r"<parameter[^<>\n]*"),
    parameter_end="</parameter>", end="</invoke>",
)  # fmt: skip
_DSML_TAGS = Tags(
    start="<｜DSML｜invoke", head=re.compile(r'<｜DSML｜invoke[ \t]+name="([^"<>\n]+)"[ \t]*>'),
    head_so_far=re.compile(r"<｜DSML｜invoke[^<>\n]*"), parameter_start="<｜DSML｜parameter",
    parameter=re.compile(r'<｜DSML｜parameter[ \t]+name="([^"<>\n]+)"(?:[ \t]+string="(?P<is_string>\w+)")?[ \t]*>'),
    parameter_so_far=re.compile(r"<｜DSML｜parameter[^<>\n]*"),
    parameter_end="</｜DSML｜parameter>", end="</｜DSML｜invoke>",
)  # fmt: skip
_GLM_TAGS = Tags(
    start="", head=re.compile(r"([\w.-]+)\s*(?=<arg_key>|</tool_call>)"),
    head_so_far=re.compile(r"[\w.-]+\s*(?:<[/a-z_]*)?"), parameter_start="<arg_key>",
    parameter=re.compile(r"<arg_key>([^<>\n]+)</arg_key>\s*<arg_value>"),
    parameter_so_far=re.compile(r"<arg_key>[^<>\n]*(?:</?[a-z_]*(?:>\s*(?:<[a-z_]*)?)?)?"),
    parameter_end="</arg_value>", end="</tool_call>",
)  # fmt: skip

MARKS = {
    ToolSyntax.HERMES: Marks(
        openings=("<tool_call>",), closings=("</tool_call>",), between=("```json", "```", "</function>"),
        tags=_FUNCTION_TAGS,
    ),
    ToolSyntax.QWEN_XML: Marks(
        openings=("<tool_call>", "<function="), closings=("</tool_call>",), between=("</function>",),
        tags=_FUNCTION_TAGS,
    ),
    ToolSyntax.SEED: Marks(
        openings=("<seed:tool_call>", "<function="), closings=("</seed:tool_call>",), between=("</function>",),
        tags=_FUNCTION_TAGS,
    ),
    ToolSyntax.LLAMA3_JSON: Marks(openings=("<|python_tag|>",), is_bare=True),
    ToolSyntax.PYTHONIC: Marks(
        openings=("<|tool_call_start|>", "<|python_start|>", "<function_calls>"),
        closings=("<|tool_call_end|>", "<|python_end|>", "</function_calls>"), is_bare=True, is_python=True,
    ),
    ToolSyntax.MISTRAL: Marks(
        openings=("[TOOL_CALLS]",), within=("[CALL_ID]", "[ARGS]"),
        head=re.compile(r"([\w.-]+)(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?\s*(?=\{)"),
        head_so_far=re.compile(r"[\w.-]+(?:\[[A-Z_]*(?:\]\w*)?){0,2}\s*"),
    ),
    ToolSyntax.DEEPSEEK: Marks(
        openings=("<｜tool▁calls▁begin｜>",), closings=("<｜tool▁calls▁end｜>",),
        between=("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "```json", "```"), within=("<｜tool▁sep｜>",),
        head=re.compile(r"(?:function<｜tool▁sep｜>)?([\w.-]+)(?:<｜tool▁sep｜>)?\s*(?:```(?:json)?)?\s*(?=\{)"),
        head_so_far=re.compile(r"[\w.-]+(?:<[｜tool▁sep]*>?)?[\w.-]*\s*(?:`{1,2}|```[json]*)?\s*"),
    ),
    ToolSyntax.DEEPSEEK_DSML: Marks(
        openings=("<｜DSML｜function_calls>",), closings=("</｜DSML｜function_calls>",), within=("｜DSML｜",),
        tags=_DSML_TAGS,
    ),
    ToolSyntax.GLM: Marks(
        openings=("<tool_call>",), closings=("</tool_call>",), within=("</arg_key>", "<arg_value>"), tags=_GLM_TAGS
    ),
    ToolSyntax.KIMI: Marks(
        openings=("<|tool_calls_section_begin|>",), closings=("<|tool_calls_section_end|>",),
        between=("<|tool_call_begin|>", "<|tool_call_end|>"), within=("<|tool_call_argument_begin|>",),
        head=re.compile(r"(?:functions\.)?([\w.-]+)(?::\d+)?\s*<\|tool_call_argument_begin\|>\s*(?=\{)"),
        head_so_far=re.compile(r"[\w.-]+(?::\d*)?\s*(?:<[|a-z_]*>?)?\s*"),
    ),
    ToolSyntax.MINIMAX: Marks(
        openings=("<minimax:tool_call>",), closings=("</minimax:tool_call>",), tags=_INVOKE_TAGS
    ),
    ToolSyntax.GRANITE: Marks(openings=("<|tool_call|>",), closings=("<|/tool_call|>",)),
    ToolSyntax.COHERE: Marks(openings=("<|START_ACTION|>",), closings=("<|END_ACTION|>",)),
    ToolSyntax.JAMBA: Marks(openings=("<tool_calls>",), closings=("</tool_calls>",)),
    ToolSyntax.NEMOTRON: Marks(openings=("<TOOLCALL>",), closings=("</TOOLCALL>",)),
    ToolSyntax.LIST: Marks(is_bare=True),
    ToolSyntax.ARGUMENTS: Marks(),
}  # fmt: skip

# Around what a model thinks before it answers. A call that it thinks about is none.
REASONING = (
    ("<think>", "</think>"), ("<thinking>", "</thinking>"), ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"), ("<seed:think>", "</seed:think>"), ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"), ("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"),
)  # fmt: skip

# The first row of which all parts stand in a template says how its model calls.
_SIGNS = (
    (("<｜DSML｜",), ToolSyntax.DEEPSEEK_DSML),
    (("<｜tool▁calls▁begin｜>",), ToolSyntax.DEEPSEEK),
    (("<|tool_calls_section_begin|>",), ToolSyntax.KIMI),
    (("<minimax:tool_call>",), ToolSyntax.MINIMAX),
    (("<arg_key>",), ToolSyntax.GLM),
    (("<seed:tool_call>",), ToolSyntax.SEED),
    (("<function=", "<parameter="), ToolSyntax.QWEN_XML),
    (("<tool_call>",), ToolSyntax.HERMES),
    (("[TOOL_CALLS]",), ToolSyntax.MISTRAL),
    (("<|START_ACTION|>",), ToolSyntax.COHERE),
    (("<TOOLCALL>",), ToolSyntax.NEMOTRON),
    (("<tool_calls>",), ToolSyntax.JAMBA),
    (("<|tool_call|>",), ToolSyntax.GRANITE),
    (("<|tool_call_start|>",), ToolSyntax.PYTHONIC),
    (("<function_calls>",), ToolSyntax.PYTHONIC),
    (("func_name1(params_name1=",), ToolSyntax.PYTHONIC),
    (("parameters", "<|python_tag|>"), ToolSyntax.LLAMA3_JSON),
    (("parameters", "ipython"), ToolSyntax.LLAMA3_JSON),
)


def syntax_of_template(source: str | None) -> ToolSyntax | None:
    """How a model calls whose chat template this is; None where it does not show."""
    if source is None:
        return None
    return next((syntax for signs, syntax in _SIGNS if all(sign in source for sign in signs)), None)


def tokens_of(syntax: ToolSyntax) -> tuple[str, ...]:
    """What may be special tokens, and has to be seen where calls are looked for."""
    marks = MARKS[syntax]
    pairs = [mark for pair in REASONING for mark in pair]
    tags = marks.tags
    of_tags = () if tags is None else (tags.start, tags.end, tags.parameter_start, tags.parameter_end)
    return (*marks.openings, *marks.closings, *marks.between, *marks.within, *of_tags, *pairs)


def reasoning_end(prompt: str, continued: str = "") -> str | None:
    """The mark that ends the reasoning in which an output begins: the template has opened it, or the text continued."""
    text = prompt.rstrip()
    for opening, closing in REASONING:
        if text.endswith(opening) or continued.rfind(opening) > continued.rfind(closing):
            return closing
    return None
