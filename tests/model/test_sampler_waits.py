"""The sampler on a device that the host must not wait for: torch's meta device, which has shapes and no values.

What needs a value (item, nonzero, a boolean index) raises there by itself. Two modes look for what does not: copies
from the host that are waited for, and what looks at its indices' bounds on CUDA.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_medha.core.sampling import Sampling
from megatron_medha.model.draw import SamplingRow
from megatron_medha.model.sampler import Sampler

VOCAB_SIZE = 3000
META = torch.device("meta")


class NoTensorIsMadeOfNumbers(TorchFunctionMode):
    """torch.tensor makes one on the host, and waits for its copy to CUDA; on meta no copy is seen."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        assert func not in (torch.tensor, torch.as_tensor) or result.device != META, f"{func} copies and waits"
        return result


class NothingIsWaitedFor(TorchDispatchMode):
    """Fails where the host would wait for the device, were it CUDA."""

    def __init__(self) -> None:
        super().__init__()
        self.num_uploads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        result = func(*args, **kwargs)
        # Zero-dimensional tensors of the host are kernel arguments.
        tensors = [one for one in [*args, result] if isinstance(one, torch.Tensor) and one.dim()]
        if {one.device for one in tensors} == {META, torch.device("cpu")}:
            is_async = args[2:] == (True,) or kwargs.get("non_blocking", False)
            assert name == "copy_" and is_async, f"{func} copies and waits"
            self.num_uploads += 1
        if name.startswith("index_put"):
            assert args[3:4] != (True,) and not kwargs.get("accumulate", False), f"{func} looks at its indices' bounds"
        return result


ASKED: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {},
    "top_k": {"top_k": 40},
    "top_p": {"top_p": 0.9},
    "both and min_p": {"top_k": 40, "top_p": 0.9, "min_p": 0.1},
    "bias": {"logit_bias": ((4, 1.0), (4, 1.0), (9, -1.0))},
    "shortest output": {"min_output_tokens": 50, "stop_token_ids": (1, 2)},
    "penalties": {"repetition_penalty": 1.2, "frequency_penalty": 0.1, "presence_penalty": 0.1},
    "logprobs": {"temperature": 0.0, "num_logprobs": 5},
    "logprobs of a draw": {"num_logprobs": 0},
}


def row(**sampling: Any) -> SamplingRow:
    prompt_ids = torch.empty(7, dtype=torch.int32, device=META)
    return SamplingRow(Sampling(max_output_tokens=100, **sampling), prompt_ids, (1, 2, 2), 5, 3)


def choose(rows: list[SamplingRow], allowed: dict[int, torch.Tensor] | None = None) -> int:
    """Copies to the device."""
    logits_RV = torch.empty(len(rows), VOCAB_SIZE + 8, dtype=torch.bfloat16, device=META)
    sampler = Sampler(VOCAB_SIZE, META)
    with NoTensorIsMadeOfNumbers(), NothingIsWaitedFor() as mode:
        choices = sampler.choose(logits_RV, rows, allowed)
    assert choices.token_ids_R.shape == (len(rows),) and choices.token_ids_R.device == META
    return mode.num_uploads


@pytest.mark.parametrize("asked", ASKED)
def test_nothing_is_waited_for_and_all_goes_to_the_device_in_one_copy(asked: str) -> None:
    assert choose([row(**ASKED[asked])] * 2) == (asked != "greedy")


def test_a_batch_of_all_that_can_be_asked_goes_to_the_device_in_one_copy() -> None:
    rows = [row(**asked) for asked in ASKED.values()]
    assert choose(rows, {1: torch.ones(VOCAB_SIZE, dtype=torch.bool), 4: torch.ones(VOCAB_SIZE, dtype=torch.bool)}) == 1


def test_the_best_are_chosen_without_any_copy() -> None:
    with NoTensorIsMadeOfNumbers(), NothingIsWaitedFor() as mode:
        Sampler(VOCAB_SIZE, META).choose_greedy(torch.empty(3, VOCAB_SIZE, device=META))
    assert mode.num_uploads == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sampler_that_may_not_look_chooses_what_one_that_may_chooses(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Flat logits: some nuclei are wider than the first guess, and bf16 ties among the best.
    logits_RV = torch.randn(len(ASKED), VOCAB_SIZE, generator=torch.Generator().manual_seed(1)).to(dtype)
    logits_RV[2::3] *= 0.05
    rows = [
        SamplingRow(Sampling(max_output_tokens=100, **asked), torch.arange(7), (1, 2, 2), seed, 3)
        for seed, asked in enumerate(ASKED.values())
    ]
    expected = Sampler(VOCAB_SIZE, "cpu").sample(logits_RV, rows)
    monkeypatch.setattr(Sampler, "_allows_host_sync", False)
    assert Sampler(VOCAB_SIZE, "cpu").sample(logits_RV, rows) == expected
