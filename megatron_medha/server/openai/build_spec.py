"""From a request's fields to a GenerationSpec: what all generating routes do alike."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from megatron_medha.server.bodies.openai_types import SharedFields
from megatron_medha.server.generation import GenerationSpec
from megatron_medha.server.openai.prompts import RawPrompt, encode_prompts
from megatron_medha.server.openai.request_fields import (
    Wishes,
    check_common,
    check_num_logprobs,
    check_wishes,
    class_of,
    created_unix_s,
    draw_answer_id,
    is_tier_known,
    priority_of,
    sampling_of,
    seed_of,
    stops_of,
)
from megatron_medha.server.ready import Ready
from megatron_medha.server.service import Service
from megatron_medha.server.tools.call_grammar import calls_or_text
from megatron_medha.server.tools.structured_output import check_guidable, guide_of
from megatron_medha.server.tools.tool_fields import ToolUse


@dataclass(frozen=True, slots=True, kw_only=True)
class Particulars:
    """What the routes differ in."""

    id_prefix: str
    num_prompts: int
    read_prompts: Callable[[], Awaitable[Sequence[RawPrompt]]]  # called once it is known that there is room for them
    prompt_param: str
    add_special_tokens: bool
    n: int                              # choices of each prompt that are answered
    num_drawn: int                      # choices of each prompt that are generated, at least n
    max_tokens: int | None
    max_tokens_param: str = "max_tokens"
    default_max_tokens: int | None = None  # None: what fits
    num_logprobs: int | None = None
    logprobs_param: str = "logprobs"
    is_echo: bool = False
    tools: ToolUse | None = None
    ignored: Sequence[str] = ()         # fields that are left out, to be named in the answer's header


async def plan(
    service: Service, ready: Ready, fields: SharedFields, wishes: Wishes, arrival_s: float, details: Particulars
) -> GenerationSpec:
    """Check a request and encode its prompts; ApiError 4xx says what is wrong."""
    config = service.config
    model = service.model_name(fields.model)
    check_common(fields)
    check_wishes(wishes, config)
    num_logprobs = details.num_logprobs
    if num_logprobs is not None:
        check_num_logprobs(num_logprobs, config, details.logprobs_param)
    grammar, tools, guide = None, details.tools, guide_of(fields)
    if tools is not None:
        if guide is not None and tools.guide is None:
            tools = calls_or_text(tools, guide, ready.tokenizer.token_id)
        guide = tools.guide  # an answer that has to call has no text to match anything
    if guide is not None:
        check_guidable(fields, ready, guide.param)
        grammar = await service.grammars.grammar_of(guide, ready, config, wishes.client)
    # The best of several is known by their tokens' log-probabilities.
    is_selected = details.num_drawn > details.n
    sampling = sampling_of(
        fields,
        ready,
        config,
        num_logprobs=0 if is_selected and num_logprobs is None else num_logprobs,
        num_prompt_logprobs=num_logprobs if details.is_echo else None,
        max_tokens=details.max_tokens,
        grammar=grammar,
    )
    service.admission.check_places(config, details.num_prompts * details.num_drawn)
    default_max_tokens = details.default_max_tokens
    prompts = await encode_prompts(
        service,
        ready,
        await details.read_prompts(),
        max_tokens=details.max_tokens,
        default_max_tokens=default_max_tokens and max(default_max_tokens, sampling.min_output_tokens),
        add_special_tokens=details.add_special_tokens,
        param=details.prompt_param,
        max_tokens_param=details.max_tokens_param,
        keeps_text=details.is_echo,
    )
    options = fields.stream_options
    slo_class = class_of(fields, wishes, service.slo)
    slo = service.slo.find(slo_class)
    return GenerationSpec(
        answer_id=draw_answer_id(details.id_prefix),
        created=created_unix_s(),
        model=model,
        arrival_s=arrival_s,
        prompts=prompts,
        n=details.num_drawn,
        num_answered=details.n,
        sampling=sampling,
        seed=seed_of(fields),
        priority=priority_of(fields, slo.priority),
        slo=slo,
        slo_class=slo_class,
        ttft_slo_s=wishes.ttft_s,
        tpot_slo_s=wishes.tpot_s,
        stops=stops_of(fields, config),
        client_stop_ids=frozenset(fields.stop_token_ids or ()),
        includes_stop=bool(fields.include_stop_str_in_output),
        skips_special_tokens=fields.skip_special_tokens is not False,
        is_stream=bool(fields.stream),
        has_progress=config.sse_progress_s is not None if wishes.has_progress is None else wishes.has_progress,
        includes_usage=bool(options and options.include_usage),
        has_continuous_usage=bool(options and options.include_usage and options.continuous_usage_stats),
        has_logprobs=num_logprobs is not None,
        is_echo=details.is_echo,
        discards_output=details.max_tokens == 0,
        names_tokens_by_id=bool(fields.return_tokens_as_token_ids),
        returns_token_ids=bool(fields.return_token_ids),
        tools=tools,
        ignored=(*details.ignored, *(() if is_tier_known(fields, service.slo) else ("service_tier",))),
    )
