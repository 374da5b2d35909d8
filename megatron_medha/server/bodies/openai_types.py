"""Bodies of requests and responses, as OpenAI and vLLM define them.

msgspec ignores unknown fields and refuses wrong types, NaN, and numbers and lengths outside of their ranges. Ranges
that depend on the model or the server's configuration are checked where a request becomes a GenerationSpec.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from megatron_medha.text.sampling_defaults import SamplingDefaults

Count = Annotated[int, Meta(ge=0)]
Probability = Annotated[float, Meta(ge=0, le=1)]
Priority = Annotated[int, Meta(ge=-(2**31) + 1, le=2**31 - 1)]
Name = Annotated[str, Meta(min_length=1, max_length=256)]  # that a client gives to something of its own
Penalty = Annotated[float, Meta(ge=-2, le=2)]
NumChoices = Annotated[int, Meta(ge=1, le=128)]  # of a prompt; OpenAI's limit
# OpenAI allows 4, vLLM any; every one is matched on every character, and so much text may be held back.
StopString = Annotated[str, Meta(min_length=1, max_length=1024)]
StopStrings = Annotated[list[StopString], Meta(max_length=16)]


class StreamOptions(Struct, kw_only=True):
    """What a stream carries beside its tokens."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchemaFormat(Struct, kw_only=True):
    """The schema that a completion must match, also where `strict` is not set."""

    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | bool | None = None
    strict: bool | None = None


class ResponseFormat(Struct, kw_only=True):
    """What form a completion takes: text, json_object or json_schema."""

    type: str
    json_schema: JsonSchemaFormat | None = None
    schema: dict[str, Any] | bool | None = None  # where llama.cpp, Together and Fireworks have it, also of json_object


class StructuredOutputs(Struct, kw_only=True):
    """vLLM's way to say what a completion must match: one of these."""

    json: dict[str, Any] | str | bool | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    structural_tag: Any = None  # refused


class AgentHints(Struct, kw_only=True):
    """What a harness of agents says of a request, in Dynamo's words; all but the priority is left out."""

    priority: Priority | None = None  # higher runs first
    strict_priority: Any = None
    osl: Any = None
    speculative_prefill: Any = None


class Extensions(Struct, kw_only=True):
    """Dynamo's `nvext`."""

    agent_hints: AgentHints | None = None


class SharedFields(Struct, kw_only=True):
    """What both kinds of completion understand."""

    model: str | None = None  # None: the model that is served
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: NumChoices | None = None
    max_tokens: Count | None = None
    min_tokens: Count | None = None
    stop: StopString | StopStrings | None = None
    stop_token_ids: Annotated[list[int], Meta(max_length=128)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    temperature: Annotated[float, Meta(ge=0)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    min_p: Probability | None = None
    # Logits are multiplied by it or its inverse, in float32: beyond these bounds they would overflow.
    repetition_penalty: Annotated[float, Meta(ge=1e-30, le=1e30)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    # The rank applies them one by one.
    logit_bias: Annotated[dict[str, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=1024)] | None = None
    priority: Priority | None = None  # lower runs first
    service_tier: str | None = None
    user: str | None = None
    cache_salt: Name | None = None        # only requests with the same one share cached prefixes
    cache_prompt: bool | None = None      # llama.cpp's name; False: nothing of it is found in the cache, nor kept there
    session_id: Name | None = None        # requests of one session continue one another
    ends_session: bool | None = None      # with this request
    # OpenAI's name; a session where no other is named.
    prompt_cache_key: Annotated[str, Meta(max_length=256)] | None = None
    nvext: Extensions | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | bool | None = None  # vLLM's older names for the same
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    # Options of other servers that change a completion: refused here unless they ask for nothing.
    use_beam_search: Any = None
    bad_words: Any = None
    allowed_token_ids: Any = None
    logits_processors: Any = None
    prompt_logprobs: Any = None
    truncate_prompt_tokens: Any = None


class CompletionRequest(SharedFields, kw_only=True):
    """Body of POST /v1/completions."""

    prompt: str | list[str | int | list[int]]
    best_of: NumChoices | None = None
    echo: bool | None = None
    logprobs: Count | None = None
    suffix: str | None = None
    add_special_tokens: bool | None = None


class FunctionDefinition(Struct, kw_only=True, omit_defaults=True):
    """A function that a chat may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None  # JSON schema of its arguments
    strict: bool | None = None


class Tool(Struct, kw_only=True, omit_defaults=True):
    """A tool that a chat may call; those of other types have no function and are left out."""

    type: str
    function: FunctionDefinition | None = None


class NamedFunction(Struct, kw_only=True):
    """A function by its name."""

    name: str


class AllowedTools(Struct, kw_only=True):
    """Those of the tools that may be called, and whether one must be."""

    mode: str
    tools: list[Tool]


class ToolChoice(Struct, kw_only=True):
    """The tool that must be called, or the tools that may be."""

    type: str
    function: NamedFunction | None = None
    allowed_tools: AllowedTools | None = None


class CalledFunction(Struct, kw_only=True):
    """Which function was called, and with what."""

    name: str
    arguments: str | dict[str, Any] | None = None  # text; it is made of the object that some clients send

    def __post_init__(self) -> None:
        if not isinstance(self.arguments, str):
            self.arguments = msgspec.json.encode(self.arguments or {}).decode()


class CustomCall(Struct, kw_only=True):
    """Which tool for free text was called, and with what."""

    name: str
    input: str


class ToolCall(Struct, kw_only=True):
    """A call that the model made; one of a tool for free text is read as a function's with that text."""

    id: str = ""
    type: str = "function"
    function: CalledFunction | None = None
    custom: CustomCall | UnsetType = UNSET

    def __post_init__(self) -> None:
        if self.custom:
            arguments = msgspec.json.encode({"input": self.custom.input}).decode()
            self.type, self.function = "function", CalledFunction(name=self.custom.name, arguments=arguments)
            self.custom = UNSET
        if self.function is None:
            raise ValueError("a call lacks its `function`")
        self.id = self.id or f"call_{self.function.name}"

    @property
    def arguments(self) -> str:
        """Of the function; every call has some once it is read."""
        assert self.function is not None and isinstance(self.function.arguments, str)
        return self.function.arguments


class ContentPart(Struct, kw_only=True):
    """One part of a message."""

    type: str
    text: str | None = None
    refusal: str | None = None


class ChatMessage(Struct, kw_only=True, omit_defaults=True):
    """One message of a chat."""

    role: str
    content: str | list[ContentPart] | None = None
    refusal: str | None = None
    reasoning_content: str | None = None  # for the template
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: CalledFunction | None = None  # OpenAI's older way to write a call

    def __post_init__(self) -> None:
        if self.function_call is not None and not self.tool_calls:
            self.tool_calls = [ToolCall(function=self.function_call)]
        self.function_call = None


class ChatRequest(SharedFields, kw_only=True):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Count | None = None
    tools: list[Tool] | None = None
    tool_choice: str | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    documents: list[dict[str, Any]] | None = None  # for the template
    reasoning_effort: str | None = None            # likewise
    echo: Any = None        # refused unless they ask for nothing, as the fields above
    modalities: Any = None


class TokenizeRequest(Struct, kw_only=True):
    """Body of POST /tokenize: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Struct, kw_only=True):
    """Body of POST /detokenize."""

    tokens: list[int]
    model: str | None = None


class PromptTokensDetails(Struct, frozen=True):
    """Where the prompt's KV came from."""

    cached_tokens: int = 0


class Usage(Struct, frozen=True):
    """What a request cost, in tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails = PromptTokensDetails()


class CompletionLogprobs(Struct):
    """Log-probabilities in the style of /v1/completions: parallel lists."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Struct, kw_only=True):
    """One continuation; in a stream, what one token adds to it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class CompletionResponse(Struct, kw_only=True):
    """Response of POST /v1/completions, and each event of its stream."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None | UnsetType = UNSET


class TopLogprob(Struct, frozen=True):
    """A likely token at some position."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob, frozen=True):
    """The chosen token at some position, and the likeliest ones."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    """Log-probabilities in the style of /v1/chat/completions."""

    content: list[TokenLogprob]
    refusal: None = None


class ResponseMessage(Struct, kw_only=True):
    """What the assistant said."""

    role: str = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(Struct, kw_only=True):
    """One completion."""

    index: int
    message: ResponseMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletionResponse(Struct, kw_only=True):
    """Response of POST /v1/chat/completions."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | UnsetType = UNSET


class ChatCompletionChunk(Struct, kw_only=True):
    """One event of a chat's stream."""

    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    choices: list[dict[str, Any]]  # what the event adds to one choice, or none with the usage at the end
    usage: Usage | None | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Model(Struct, kw_only=True):
    """A model that is served."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "megatron_medha"
    root: str
    parent: None = None
    max_model_len: int | None = None
    sampling_defaults: SamplingDefaults = SamplingDefaults()  # for what requests leave out; other servers lack it


class ModelList(Struct, kw_only=True):
    """Response of GET /v1/models."""

    object: str = "list"
    data: list[Model]


class TokenizeResponse(Struct, kw_only=True):
    """Response of POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeResponse(Struct, kw_only=True):
    """Response of POST /detokenize."""

    prompt: str


class Readiness(Struct, kw_only=True):
    """Response of GET /ready and /health."""

    status: str
    detail: str
    fraction: float


class Reloaded(Struct, kw_only=True):
    """Response of POST /admin/reload."""

    changed: list[str]  # names of the settings that have another value now


class Version(Struct, kw_only=True):
    """Response of GET /version. The last bits of outputs depend on it, the layout, and with oneDNN the CPU."""

    version: str
    torch: str | None = None   # of its installed package; None: there is none
    device: str | None = None  # with dtypes and kernels; None: the model is not ready
