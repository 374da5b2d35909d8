"""`LLM`: a model in this process's own ranks, called from ordinary code. For code on an event loop: async_llm.py."""

from __future__ import annotations

import queue
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from tqdm import tqdm

from megatron_medha.python_api.api_errors import EngineError, RequestError
from megatron_medha.python_api.local_service import LocalService
from megatron_medha.python_api.outputs import CompletionOutput, RequestOutput
from megatron_medha.python_api.prompts_and_chats import (
    Conversation,
    PromptInput,
    RequestSource,
    chat_sources,
    prompt_sources,
    source_of,
)
from megatron_medha.python_api.python_options import python_serve_config
from megatron_medha.python_api.request_runs import finish_all, send_steps
from megatron_medha.python_api.sampling_params import SamplingParams
from megatron_medha.text.tokenizer import Tokenizer

OnError = Literal["raise", "return"]


class LLM:
    """A model that answers in Python, with the engine, the ranks and the options of `medha serve`.

    Options are keys ({"parallel.tp": 2} with **, or parallel={"tp": 2}), groups (scheduler="fcfs"), or vLLM's names
    (tensor_parallel_size=2). Ends with close(), with its block, or with the process. Raises ConfigError for options and
    checkpoints that do not fit, EngineError where the ranks do not come up.
    """

    def __init__(self, checkpoint: str | Path | None = None, **options: Any) -> None:
        self._local = LocalService(python_serve_config(checkpoint, options))
        self._closing = weakref.finalize(self, self._local.close)  # at exit of the process, too
        try:
            self._local.wait_until_ready()
        except BaseException:
            self._closing()
            raise

    def generate(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        on_error: OnError = "raise",
    ) -> list[RequestOutput]:
        """Complete every prompt; the outputs in their order.

        A prompt is text, token ids, or a mapping with "prompt" or "prompt_token_ids". A request that fails does not
        affect the others: when all have ended, its error is raised and has the `outputs` of all of them. With
        on_error="return" none is raised, and RequestOutput.error says which have failed.
        """
        return self._all(prompt_sources(prompts, sampling_params), use_tqdm, on_error)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        on_error: OnError = "raise",
        **fields: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, each a list of messages, like generate().

        fields: of a chat's body, such as tools, chat_template_kwargs and continue_final_message.
        """
        return self._all(chat_sources(messages, sampling_params, fields), use_tqdm, on_error)

    def stream(
        self,
        prompt: PromptInput | Conversation,
        sampling_params: SamplingParams | None = None,
        **fields: Any,
    ) -> Iterator[CompletionOutput]:
        """What each step adds to the completion of a prompt, or to the answer of a chat if messages are given.

        An iterator that is left early ends the request.
        """
        source = source_of(prompt, sampling_params, fields)
        deltas: queue.SimpleQueue[CompletionOutput | BaseException | None] = queue.SimpleQueue()

        future = self._local.submit(send_steps(self._local, source, lambda _, new: new, deltas.put))
        try:
            while (item := deltas.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            future.cancel()

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's."""
        return self._local.service.ready().tokenizer

    def close(self) -> None:
        """End engine and ranks; requests of other threads fail."""
        self._closing()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _all(self, sources: list[RequestSource], use_tqdm: bool, on_error: OnError) -> list[RequestOutput]:
        if on_error not in ("raise", "return"):
            raise ValueError(f"on_error={on_error!r}: expected 'raise' or 'return'")
        progress: AbstractContextManager[Any] = (
            tqdm(total=len(sources), desc="requests", dynamic_ncols=True) if use_tqdm else nullcontext()
        )
        with progress as bar:
            outputs = self._local.run(finish_all(self._local, sources, _shown_on(bar)))
        error = next((output.error for output in outputs if output.error is not None), None)
        if isinstance(error, RequestError | EngineError) and on_error == "raise":
            error.outputs = outputs
            raise error
        return outputs


def _shown_on(bar: Any) -> Callable[[RequestOutput], None]:
    num_tokens = 0

    def show(output: RequestOutput) -> None:
        nonlocal num_tokens
        num_tokens += sum(len(one.token_ids) for one in output.outputs)
        elapsed_s = bar.format_dict["elapsed"]
        bar.set_postfix_str(f"{num_tokens / max(elapsed_s, 1e-9):,.0f} output tokens/s", refresh=False)
        bar.update()

    return (lambda output: None) if bar is None else show
