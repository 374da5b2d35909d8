"""Serving for Megatron models under traffic that mixes short chats with million-token documents.

The Python API is here: LLM, AsyncLLM, SamplingParams. Importing the package alone loads nothing.
"""

__version__ = "0.1.0"

TYPE_CHECKING = False
if TYPE_CHECKING:
    from megatron_medha.python_api.api_errors import EngineError, RequestError
    from megatron_medha.python_api.async_llm import AsyncLLM
    from megatron_medha.python_api.llm import LLM
    from megatron_medha.python_api.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
    from megatron_medha.python_api.sampling_params import SamplingParams

_MODULES = {
    "AsyncLLM": "async_llm",
    "CompletionOutput": "outputs",
    "EngineError": "api_errors",
    "LLM": "llm",
    "Logprob": "outputs",
    "RequestError": "api_errors",
    "RequestMetrics": "outputs",
    "RequestOutput": "outputs",
    "SamplingParams": "sampling_params",
}
__all__ = [
    "AsyncLLM",
    "CompletionOutput",
    "EngineError",
    "LLM",
    "Logprob",
    "RequestError",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    from megatron_medha.system.compiled_core import use_compiled_core

    use_compiled_core()  # before the scheduler is loaded
    return getattr(importlib.import_module(f"{__name__}.python_api.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
