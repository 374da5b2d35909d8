"""Are a trainer's log-probabilities the server's, bit for bit, through 200 steps of training?

    python -m experiments.one_bit_pattern.grpo checkpoints/tiny

Each step saves the trainer's weights as a Megatron checkpoint, starts a rank on it in this process, and samples groups
of completions in chunks and batches that are drawn at random. The trainer computes the same log-probabilities with the
layers of megatron_medha.model.training_spec and takes a step along the policy gradient of a reward that is relative to
the group: the share of letters. Bar: 0 differing bits and a KL divergence of 0 at each step.
--plain: with Megatron's usual layers in the trainer, for comparison; there is no bar then.
--out: steps that have run are kept there and not run again.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
from array import array
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from experiments.lib.results_file import ResultsFile, verdict
from megatron_medha.checkpoints.detect import load_weights, read_model_config
from megatron_medha.checkpoints.megatron_checkpoint import save_megatron_checkpoint
from megatron_medha.cluster.messages import NewRequest, RankStep
from megatron_medha.cluster.model_options import ModelOptions
from megatron_medha.cluster.rank_config import RankConfig
from megatron_medha.core.batch import Chunk
from megatron_medha.core.kv.block_pool import Extent
from megatron_medha.core.kv.ops import append_op, drop_op
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.sampling import Sampling
from megatron_medha.model.build import build_model
from megatron_medha.model.training_spec import served_logprobs, training_block_spec, use_served_output
from megatron_medha.models.model_config import ModelConfig
from megatron_medha.parallel.groups import build_groups
from megatron_medha.tiny.new_checkpoint import one_rank
from megatron_medha.worker.startup.load import load_rank

PROMPTS = (b"import os\n\n\ndef ", b"class Reader:\n    def ", b'    """Return the ', b"for name in ")
GROUP = 4             # completions of a prompt
NUM_OUTPUTS = 24      # tokens of a completion
BLOCK_SIZE = 16
BLOCKS_EACH = 4
LEARNING_RATE = 3e-4


class Completion(NamedTuple):
    """What the server has sampled, and its log-probabilities of it."""

    prompt: list[int]
    output: list[int]
    logprobs: list[float]


def main() -> int:
    """Run what is missing, print every 20th step and the verdicts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--out", type=Path, help="a file of steps, and of the trainer's state beside it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, one_rank():
        torch.set_num_threads(1)
        out = options.out or Path(directory) / "grpo.json"
        results = ResultsFile(out, {"dtype": options.dtype, "plain": options.plain})
        trainer = Trainer(options.checkpoint, options.dtype, options.plain, out.with_suffix(".pt"))
        for number in range(trainer.num_steps, options.steps):
            cell = trainer.step(Path(directory))
            results.keep(str(number), cell)
            trainer.save()
            if number % 20 == 0 or number == options.steps - 1:
                print(f"step {number}: " + ", ".join(f"{name} {value:.6g}" for name, value in cell.items()), flush=True)
        return report([results.cells[str(number)] for number in range(options.steps)], options.plain)


def report(cells: list[dict[str, float]], is_plain: bool) -> int:
    """Print sums; 1 if a bar is missed."""
    differing, tokens = (int(sum(cell[name] for cell in cells)) for name in ("differing", "tokens"))
    worst = max(abs(cell["kl"]) for cell in cells)
    first, last = (sum(cell["reward"] for cell in part) / len(part) for part in (cells[:20], cells[-20:]))
    nats = sum(cell["nats"] for cell in cells[-20:]) / len(cells[-20:])
    print(f"reward: {first:.3f} in the first 20 steps, {last:.3f} in the last, of tokens of {nats:.2f} nats")
    if is_plain:
        print(f"log-probabilities that differ: {differing} of {tokens}; largest KL divergence of a step {worst:.3g}")
        return 0
    is_met = verdict("log-probabilities that differ", f"{differing} of {tokens}", "0", differing == 0)
    is_zero = verdict("largest KL divergence of a step", f"{worst:g}", "0", worst == 0)
    return 0 if is_met and is_zero else 1


class Trainer:
    """The policy, its optimizer, and the server's restarts."""

    def __init__(self, checkpoint: Path, dtype: str, is_plain: bool, state: Path) -> None:
        self._state = state
        self._config: ModelConfig = replace(read_model_config(checkpoint), dtype=dtype)
        self.model = build_model(
            self._config,
            dtype=getattr(torch, dtype),
            device=torch.device("cpu"),
            pgs=build_groups(ParallelLayout()),
            block_spec=None if is_plain else training_block_spec(self._config),
        )
        if not is_plain:
            use_served_output(self.model)
        load_weights(self.model, self._config, checkpoint, lambda *_: None)
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
        self.num_steps = 0
        if state.is_file():
            kept = torch.load(state, weights_only=True)
            self.model.load_state_dict(kept["model"])
            self._optimizer.load_state_dict(kept["optimizer"])
            self.num_steps = kept["num_steps"]

    def save(self) -> None:
        """So that a run that is killed goes on."""
        weights = {name: value for name, value in self.model.state_dict().items() if isinstance(value, Tensor)}
        state = {"model": weights, "optimizer": self._optimizer.state_dict(), "num_steps": self.num_steps}
        unfinished = self._state.with_suffix(".unfinished")
        torch.save(state, unfinished)
        unfinished.replace(self._state)

    def step(self, directory: Path) -> dict[str, float]:
        """Sample, compare, update."""
        target = directory / "weights"
        shutil.rmtree(target, ignore_errors=True)
        save_megatron_checkpoint(self.model, self._config, target, self.num_steps)
        completions = sampled(target, self._config.dtype, self.num_steps)
        told = torch.tensor([one.logprobs for one in completions], dtype=torch.float32)
        own = self._logprobs(completions)
        rewards = torch.tensor([reward_of(one.output) for one in completions]).view(-1, GROUP)
        advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
        ratios = (own - told).exp()
        loss = -(ratios * advantages.view(-1, 1)).mean()
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self.num_steps += 1
        difference = (own - told).detach().double()
        return {
            "reward": rewards.mean().item(),
            "nats": -told.mean().item(),  # of a sampled token
            "kl": (difference.exp() - difference - 1).mean().item(),  # never negative, 0 for equal ones alone
            "differing": int((own.detach().view(torch.int32) != told.view(torch.int32)).sum()),
            "tokens": told.numel(),
        }

    def _logprobs(self, completions: list[Completion]) -> Tensor:
        """Of the outputs' tokens, [B, outputs], with gradients; prompts are filled up on the right of the outputs."""
        rows = [one.prompt + one.output for one in completions]
        longest = max(map(len, rows))
        logits_BSV = self.model(torch.tensor([row + [0] * (longest - len(row)) for row in rows]), None, None)
        logits_BSV = logits_BSV[..., : self._config.vocab_size]
        found = []
        for logits_SV, one in zip(logits_BSV, completions, strict=True):
            first = len(one.prompt) - 1
            found.append(served_logprobs(logits_SV[first : first + NUM_OUTPUTS], torch.tensor(one.output)))
        return torch.stack(found)


def reward_of(output: list[int]) -> float:
    """The share of letters."""
    return sum(chr(token).isalpha() for token in output if token < 128) / len(output)


def request(name: str, prompt: list[int], seed: int) -> NewRequest:
    """Sampled from the model's own distribution."""
    sampling = Sampling(max_output_tokens=NUM_OUTPUTS, temperature=1.0, seed=seed, num_logprobs=0)
    return NewRequest(name, array("i", prompt).tobytes(), len(prompt), sampling)


def sampled(checkpoint: Path, dtype: str, seed: int) -> list[Completion]:
    """A group of completions of each prompt, by a server's rank on that checkpoint, under a random schedule."""
    rng = random.Random(f"grpo {seed}")
    config = RankConfig(
        server_endpoint="inproc://nobody",
        checkpoint=str(checkpoint),
        model=ModelOptions(device="cpu", dtype=dtype, block_size=BLOCK_SIZE, num_threads=1),
        kv_memory_bytes=16 << 20,
    )
    rank, _ = load_rank(config, lambda what, fraction: None)
    prompts = [list(prompt) for prompt in PROMPTS for _ in range(GROUP)]
    outputs: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    num_computed = [0] * len(prompts)
    batch_id = 0
    while unfinished := [r for r in range(len(prompts)) if len(outputs[r]) < NUM_OUTPUTS]:
        chunks, new, kv_ops = [], [], []
        for r in rng.sample(unfinished, rng.randint(1, len(unfinished))):
            name, known = str(r), len(prompts[r]) + len(outputs[r])
            if outputs[r] and rng.random() < 0.02:  # preempted: all that is known is computed again
                num_computed[r] = 0
            count = rng.randint(1, known - num_computed[r])
            if num_computed[r] == 0:
                kv_ops += [drop_op(name), append_op(name, 0, (Extent(r * BLOCKS_EACH, BLOCKS_EACH),))]
                if not outputs[r]:
                    new.append(request(name, prompts[r], seed * len(prompts) + r))
            chunks.append(Chunk(name, num_computed[r], count, num_computed[r] + count == known))
            num_computed[r] += count
        batch_id += 1
        done = rank.run(RankStep(batch_id, tuple(chunks), tuple(new), kv_ops=tuple(kv_ops)))
        assert not done.failed, done.failed
        for token in done.tokens:
            outputs[int(token.request_id)].append(token.token_id)
            logprobs[int(token.request_id)].append(token.logprobs.logprob)
    return [Completion(*one) for one in zip(prompts, outputs, logprobs, strict=True)]


if __name__ == "__main__":
    raise SystemExit(main())
