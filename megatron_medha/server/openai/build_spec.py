"""From the fields that all generating routes share to a GenerationSpec that lacks its prompts only."""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import Iterator, Sequence

from megatron_medha.server.bodies.openai_types import AgentHints, SharedFields
from megatron_medha.server.generation import GenerationSpec
from megatron_medha.server.http.http_errors import bad_request, rejected
from megatron_medha.server.openai.request_fields import (
    REFUSED,
    RequestContext,
    refuse_all,
    sampling_of,
)
from megatron_medha.server.service import Service
from megatron_medha.server.slo import SloClass
from megatron_medha.server.tools.call_grammar import calls_or_text
from megatron_medha.server.tools.structured_output import check_constrainable, constraint_of
from megatron_medha.server.tools.tool_fields import ToolUse


async def begin_spec(
    service: Service,
    context: RequestContext,
    fields: SharedFields,
    *,
    id_prefix: str,
    n: int,
    num_drawn: int | None = None,
    num_prompts: int = 1,
    max_tokens: int | None,
    num_logprobs: int | None,
    logprobs_param: str = "logprobs",
    is_echo: bool = False,
    tools: ToolUse | None = None,
    ignored: Sequence[str] = (),
) -> GenerationSpec:
    """All of it but the prompts, once there are places for it; ApiError 4xx says what is wrong.

    n: choices of each prompt that are answered. num_drawn: and those that are generated, if more.
    ignored: fields that are left out, to be named in the response's header.
    """
    config, ready = service.config, context.ready
    model = service.model_name(fields.model)
    refuse_all(fields, REFUSED)
    if num_logprobs is not None and num_logprobs > config.max_logprobs:
        raise bad_request(f"{logprobs_param}: at most {config.max_logprobs}", logprobs_param)
    grammar, guide = None, constraint_of(fields)
    if tools is not None:
        if guide is not None and tools.guide is None:
            tools = calls_or_text(tools, guide, ready.tokenizer.token_id)
        guide = tools.guide  # a completion that has to call has no text to match anything
    if guide is not None:
        check_constrainable(fields, ready.facts, guide.param)
        grammar = await service.grammars.grammar_of(guide, ready.facts, ready.tokenizer, config, context.address)
    num_drawn = num_drawn or n
    sampling = sampling_of(
        fields,
        ready,
        # The best of several is known by their tokens' log-probabilities.
        num_logprobs=0 if num_drawn > n and num_logprobs is None else num_logprobs,
        num_prompt_logprobs=num_logprobs if is_echo else None,
        max_tokens=max_tokens,
        grammar=grammar,
    )
    if (rejection := service.admission.check_capacity(config, num_prompts * num_drawn)) is not None:
        raise rejected(rejection)
    options = fields.stream_options
    stops = [fields.stop] if isinstance(fields.stop, str) else fields.stop or ()
    tier_class = service.slo.class_of_tier(fields.service_tier)
    slo_class = context.slo_class or tier_class or service.slo.default_class
    slo = service.slo.find(slo_class)
    hints = (fields.nvext and fields.nvext.agent_hints) or AgentHints()
    session = fields.session_id or context.session_id or fields.prompt_cache_key
    return GenerationSpec(
        # Drawn here, because sub-requests are named after it and clients' own ids may collide.
        response_id=f"{id_prefix}-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=model,
        arrival_s=context.arrival_s,
        prompts=(),
        n=num_drawn,
        num_answered=n,
        sampling=sampling,
        seed=secrets.randbits(63) if fields.seed is None else fields.seed,
        priority=_priority(fields, hints, slo),
        slo=slo,
        slo_class=slo_class,
        ttft_slo_s=context.ttft_s,
        tpot_slo_s=context.tpot_s,
        stops=tuple(dict.fromkeys(stops)),
        client_stop_ids=frozenset(fields.stop_token_ids or ()),
        includes_stop=bool(fields.include_stop_str_in_output),
        skips_special_tokens=fields.skip_special_tokens is not False,
        is_stream=bool(fields.stream),
        has_progress=config.sse_progress_s is not None if context.has_progress is None else context.has_progress,
        includes_usage=bool(options and options.include_usage),
        has_continuous_usage=bool(options and options.include_usage and options.continuous_usage_stats),
        has_logprobs=num_logprobs is not None,
        is_echo=is_echo,
        discards_output=max_tokens == 0,
        names_tokens_by_id=bool(fields.return_tokens_as_token_ids),
        returns_token_ids=bool(fields.return_token_ids),
        prefix_root=None if fields.cache_prompt is False else service.prefix_root(
            ready.facts, context.address, fields.cache_salt or ""
        ),
        # Those of two owners are two, whatever their names, as an owner's has no blanks.
        session_id=f"{service.session_owner(context.key, context.address)} {session}" if session else "",
        ends_session=bool(session and fields.ends_session),
        tools=tools,
        ignored=(
            *ignored,
            *(("service_tier",) if tier_class is None else ()),
            *(("ends_session",) if fields.ends_session and not session else ()),
            *_ignored_hints(hints),
        ),
    )


def _priority(fields: SharedFields, hints: AgentHints, slo: SloClass) -> int:
    """Lower runs first; of hints, higher does."""
    if fields.priority is not None:
        return fields.priority
    return slo.priority if hints.priority is None else -hints.priority


def _ignored_hints(hints: AgentHints) -> Iterator[str]:
    for name in ("strict_priority", "osl", "speculative_prefill"):
        if getattr(hints, name) is not None:
            yield f"nvext.agent_hints.{name}"
