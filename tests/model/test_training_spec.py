"""Layers for training whose forward pass has the bits of the server's."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_medha.core.errors import ConfigError
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.model_spec import Experts, RopeScaling
from megatron_medha.core.sampling import Sampling
from megatron_medha.model.build import build_model, llama_layer_spec
from megatron_medha.model.cpu_model import use_cpu_kernels
from megatron_medha.model.draw import SamplingRow
from megatron_medha.model.logprobs import prompt_logprobs
from megatron_medha.model.sampler import Sampler
from megatron_medha.model.training_spec import served_logprobs, training_block_spec, use_served_output
from megatron_medha.models.model_config import ModelConfig
from megatron_medha.parallel.groups import MedhaPGs, build_groups
from megatron_medha.tiny.new_checkpoint import one_rank
from tests.model.paged_run import PagedRun

CPU = torch.device("cpu")
LENGTH = 90
CONFIG = ModelConfig(
    name="small",
    num_layers=2,
    hidden_size=96,
    ffn_hidden_size=200,
    num_heads=4,
    num_kv_heads=2,
    head_dim=24,
    vocab_size=300,
    max_context_len=512,
    norm_epsilon=1e-6,
    rope_theta=10_000.0,
    dtype="float32",
    stop_token_ids=(0,),
)
EXPERTS = Experts(num_experts=8, num_per_token=2, ffn_hidden_size=40)
KINDS = {
    "llama": CONFIG,
    "biases of q, k and v": replace(CONFIG, has_qkv_bias=True),
    "norms of q and k": replace(CONFIG, has_qk_norm=True),
    "tied embeddings": replace(CONFIG, has_tied_embeddings=True),
    "experts": replace(CONFIG, experts=EXPERTS),
    "experts in one layer, a shared one with a gate": replace(
        CONFIG, experts=replace(EXPERTS, layers=(False, True), shared_ffn_hidden_size=48, has_shared_gate=True)
    ),
    "experts chosen by sigmoids, in groups": replace(
        CONFIG,
        experts=replace(
            EXPERTS, score="sigmoid", has_choice_bias=True, num_groups=4, num_groups_per_token=2, num_per_token=4,
            weight_scale=2.5, router_dtype="fp32", shared_ffn_hidden_size=48,
        ),  # fmt: skip
    ),
}


@pytest.fixture(scope="module")
def pgs() -> Iterator[MedhaPGs]:
    with one_rank():
        torch.set_num_threads(1)
        yield build_groups(ParallelLayout())


def trained(config: ModelConfig, dtype: torch.dtype, pgs: MedhaPGs, virtual_tp: int = 1) -> GPTModel:
    """A model to train, with random weights."""
    spec = training_block_spec(config, virtual_tp)
    model = build_model(config, dtype=dtype, device=CPU, pgs=pgs, block_spec=spec)
    use_served_output(model, virtual_tp)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.15 if parameter.dim() > 1 else 1.0 + 0.1 * noise)
    return model


def like(model: GPTModel, config: ModelConfig, pgs: MedhaPGs) -> GPTModel:
    """The model that serves, with the same weights."""
    plain = build_model(config, dtype=model.config.params_dtype, device=CPU, pgs=pgs)
    plain.load_state_dict(model.state_dict())
    return plain


def usual(model: GPTModel, config: ModelConfig, pgs: MedhaPGs) -> GPTModel:
    """A model of Megatron's usual layers to train, with the same weights."""
    layer = llama_layer_spec(config, CPU)
    layers = [layer] * config.num_layers
    if config.experts is not None:
        routed = copy.deepcopy(layer)
        experts = get_gpt_layer_local_spec(num_experts=config.experts.num_experts, moe_grouped_gemm=False)
        routed.submodules.mlp = experts.submodules.mlp
        layers = [routed if has else layer for has in config.experts.layers or (True,) * config.num_layers]
    spec = TransformerBlockSubmodules(layer_specs=layers, layer_norm=WrappedTorchNorm)
    plain = build_model(config, dtype=model.config.params_dtype, device=CPU, pgs=pgs, block_spec=spec)
    plain.load_state_dict(model.state_dict())
    return plain


def prompts() -> torch.Tensor:
    return torch.randint(0, 300, (3, LENGTH), generator=torch.Generator().manual_seed(1))


def served_logits(model: GPTModel, config: ModelConfig, virtual_tp: int = 1) -> torch.Tensor:
    """In chunks, beside others and token by token; [B, S, V]."""
    run = PagedRun(model, config, block_size=16, num_slots=1024)
    use_cpu_kernels(model, run.backend, virtual_tp=virtual_tp)
    model.requires_grad_(False)
    one, two, three = (run.add(token_ids) for token_ids in prompts())
    run.step([(one, 37), (two, 80)])
    run.step([(one, 53), (three, 90), (two, 1)])
    for _ in range(LENGTH - 81):
        run.step([(two, 1)])
    return torch.stack([torch.cat(prompt.logits) for prompt in (one, two, three)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_forward_pass_of_training_has_the_servers_bits(kind: str, dtype: torch.dtype, pgs: MedhaPGs) -> None:
    config = KINDS[kind]
    model = trained(config, dtype, pgs)
    served = served_logits(like(model, config, pgs), config)
    assert torch.equal(model(prompts(), None, None)[..., : config.vocab_size], served[..., : config.vocab_size])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_so_it_has_with_the_servers_slices(dtype: torch.dtype, pgs: MedhaPGs) -> None:
    model = trained(CONFIG, dtype, pgs, virtual_tp=4)
    served = served_logits(like(model, CONFIG, pgs), CONFIG, virtual_tp=4)
    logits = model(prompts(), None, None)
    assert torch.equal(logits[..., : CONFIG.vocab_size], served[..., : CONFIG.vocab_size])
    logits.float().logsumexp(-1).sum().backward()  # gradients do not mind them
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    with pytest.raises(ConfigError, match="model.virtual_tp=8: must divide"):
        training_block_spec(replace(CONFIG, ffn_hidden_size=204), 8)


def test_after_an_update_of_the_weights_it_has_those_of_the_new_ones(pgs: MedhaPGs) -> None:
    model = trained(CONFIG, torch.float32, pgs)
    before = model(prompts(), None, None)
    before.logsumexp(-1).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data.sub_(parameter.grad, alpha=1e-4)  # as Megatron's optimizers do, past autograd's notice
    after = model(prompts(), None, None)
    assert not torch.equal(before, after)
    assert torch.equal(after, served_logits(like(model, CONFIG, pgs), CONFIG))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_ordinary_layers(kind: str, pgs: MedhaPGs) -> None:
    # Both compute in fp32; sums in another order.
    model = trained(KINDS[kind], torch.float32, pgs)
    plain = usual(model, KINDS[kind], pgs)
    for each in (model, plain):
        torch.nn.functional.cross_entropy(each(prompts(), None, None).flatten(0, 1), prompts().flatten()).backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        error = (ours.grad - theirs.grad).norm() / theirs.grad.norm()
        assert error < 1e-4, (name, error)


def test_log_probabilities_are_those_the_server_tells_of_prompts_and_of_sampled_tokens(pgs: MedhaPGs) -> None:
    logits_TV = served_logits(like(trained(CONFIG, torch.float32, pgs), CONFIG, pgs), CONFIG)[0, :-1]
    next_ids = prompts()[0, 1:]
    told = torch.tensor([each.logprob for each in prompt_logprobs(logits_TV, next_ids, 0)], dtype=torch.float32)
    assert torch.equal(served_logprobs(logits_TV, next_ids), told)
    sampling = Sampling(max_output_tokens=1, temperature=1.0, num_logprobs=0)
    rows = [SamplingRow(sampling, None, [], seed, 0) for seed in range(len(logits_TV))]
    sampled = [row.logprobs for row in Sampler(300, CPU).sample(logits_TV, rows)]
    told = torch.tensor([each.logprob for each in sampled], dtype=torch.float32)
    assert torch.equal(served_logprobs(logits_TV, torch.tensor([each.token_id for each in sampled])), told)


def test_models_that_the_server_computes_otherwise_are_refused() -> None:
    with pytest.raises(ConfigError, match="Llama-like"):
        training_block_spec(replace(CONFIG, has_layer_norms=True))
    with pytest.raises(ConfigError, match="dynamic"):
        training_block_spec(replace(CONFIG, rope_scaling=RopeScaling(kind="dynamic", factor=2.0)))
