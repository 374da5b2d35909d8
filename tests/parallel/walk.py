"""Random walks of the real scheduler over real ranks, every token and logit compared with the plain forward.

One walk is one layout, one random configuration (chunk rule and size, block and shard size, memory small enough for
preemptions) and a random mix of requests. Time is virtual: what a step took is drawn, so that budgets, slack and
preemptions vary without waiting for them. So is which stage is done first: a walk is the same however busy the machine.
"""

from __future__ import annotations

import itertools
import random
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_medha.bits.rank_processes import Answer, RankProcesses
from megatron_medha.cluster.messages import NewRequest, RankStep, SampledToken, StepDone
from megatron_medha.cluster.model_options import ModelOptions
from megatron_medha.cluster.rank_config import RankConfig
from megatron_medha.core.batch import (
    Aborted,
    Arrived,
    Batch,
    Completed,
    Event,
    FirstStageDone,
    Output,
    Preempted,
    Rejected,
    TokenOut,
)
from megatron_medha.core.cost.step_cost import Hardware, RooflineCost
from megatron_medha.core.kv.kv_config import NO_PREFIX_CACHE, KVConfig
from megatron_medha.core.kv.kv_memory import KVMemory
from megatron_medha.core.kv.ops import is_for
from megatron_medha.core.kv.prefix_keys import GranuleKeys
from megatron_medha.core.layout import Coord, ParallelLayout
from megatron_medha.core.model_shape import ModelShape
from megatron_medha.core.request import Request
from megatron_medha.core.sampling import Sampling, TokenLogprobs
from megatron_medha.core.scheduling.chunking import Chunking
from megatron_medha.core.scheduling.policies import POLICIES
from megatron_medha.core.scheduling.scheduler import Scheduler
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig

VOCAB_SIZE = 509  # a prime: no tp divides it, so the padding of the vocabulary is in every comparison
NUM_LAYERS = 4
KV_BYTES = 2 << 20
# The first promise: relative to the largest logit.
RELATIVE_TOLERANCE = 1e-4
# So slow that a tile is a matter of milliseconds: budgets bind with prompts of a few dozen tokens.
SLOW = Hardware(
    name="slow", flops_per_s=3e8, memory_bytes_per_s=1e9, step_overhead_s=2e-4, layer_overhead_s=2e-5
)  # fmt: skip

KEY_ROOT = b"root" * 8

Reference = Callable[[list[int]], np.ndarray]  # token ids -> logits [T, V] of the plain forward


def save_model(directory: Path, family: str = "Llama", **options: Any) -> Reference:
    """A random model with spread logits, saved as Hugging Face safetensors, and its plain forward."""
    import transformers

    torch.manual_seed(0)
    options = {
        "vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 4096, "initializer_range": 0.2,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **options,
    }  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**options)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.2)  # made as zeros, which would hide a bias that is not applied
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)  # made as ones
    model.save_pretrained(directory)

    def reference(token_ids: list[int]) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.tensor([token_ids])).logits[0].numpy()

    return reference


@dataclass(frozen=True)
class Case:
    """One random configuration and its requests."""

    layout: ParallelLayout
    scheduler: SchedulerConfig
    block_size: int
    num_blocks: int
    shard_tokens: int
    requests: tuple[Request, ...]
    sampling: dict[str, Sampling]
    prompts: dict[str, list[int]]
    aborted: dict[str, int]  # requests that are aborted, and after how many batches
    seed: int
    kv: KVConfig = NO_PREFIX_CACHE


def random_case(layout: ParallelLayout, seed: int, num_requests: int = 8) -> Case:
    """A configuration in which requests span every kvp rank, grow while they decode, and lose their KV."""
    rng = random.Random(f"{layout}/{seed}")
    block_size = rng.choice((2, 4, 8))
    shard_tokens = block_size * rng.randint(1, 6 if layout.kvp > 1 else 40)
    most = min(layout.kvp * shard_tokens, 240)
    # Often hardly more than one shard, so that decodes that grow take the KV of others.
    num_blocks = shard_tokens // block_size + rng.choice((1, rng.randint(1, 10), 40))
    max_batch_tokens = rng.choice((16, 64, 400))
    requests, sampling, prompts = [], {}, {}
    arrival_s = 0.0
    for index in range(num_requests):
        request_id = f"r{index}"
        total = rng.choice((rng.randint(2, min(most, 16)), rng.randint(2, most), most))
        num_outputs = rng.randint(1, min(24, total - 1))
        arrival_s += rng.choice((0.0, rng.expovariate(20.0)))
        requests.append(
            Request(
                request_id=request_id, num_prompt_tokens=total - num_outputs, max_output_tokens=num_outputs,
                arrival_s=arrival_s, ttft_slo_s=rng.choice((None, 0.01)), priority=rng.choice((0, 0, 1)),
            )  # fmt: skip
        )
        prompts[request_id] = [rng.randrange(4, VOCAB_SIZE) for _ in range(total - num_outputs)]
        if rng.random() < 0.03:
            prompts[request_id][-1] = VOCAB_SIZE + 3  # its own fault, and nobody else's
        sampling[request_id] = Sampling(
            max_output_tokens=num_outputs,
            temperature=0.0,
            presence_penalty=rng.choice((0.0, 0.0, 1.5)),
            num_prompt_logprobs=rng.choice((None, None, 0)),
        )
    config = SchedulerConfig(
        policy=rng.choice(sorted(POLICIES)),
        chunking=rng.choice((Chunking.ADAPTIVE, Chunking.FIXED, Chunking.WHOLE)),
        step_budget_s=rng.choice((2e-3, 0.01, 0.05)),
        tile_tokens=rng.choice((1, 4, 8)),
        fixed_chunk_tokens=rng.choice((3, 8, 32)),
        max_batch_tokens=max_batch_tokens,
        max_num_sequences=rng.choice((2, 8, 16)),
        watermark=0.0,
    )
    return Case(
        layout=layout, scheduler=config, block_size=block_size, num_blocks=num_blocks, shard_tokens=shard_tokens,
        requests=tuple(requests), sampling=sampling, prompts=prompts,
        aborted={r.request_id: rng.randint(1, 30) for r in requests if rng.random() < 0.08}, seed=seed,
    )  # fmt: skip


@dataclass
class Client:
    """What has come back for one request."""

    tokens: list[int] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)
    prompt_logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    rejected: str | None = None
    has_ended: bool = False


@dataclass
class Outcome:
    """What a walk has seen."""

    num_batches: int = 0
    num_tokens: int = 0
    num_preempted: int = 0
    num_cached_tokens: int = 0   # of prompts
    num_resumed_behind: int = 0  # chunks that begin a preempted request behind hits
    num_shared_chunks: int = 0   # on several kvp ranks
    num_streamed: int = 0        # batches formed while another was in flight
    most_kvp_ranks: int = 0      # of one chunk
    largest_error: float = 0.0   # of a logit, relative to the largest

    def add(self, other: Outcome) -> None:
        """Count another walk in."""
        self.num_batches += other.num_batches
        self.num_tokens += other.num_tokens
        self.num_preempted += other.num_preempted
        self.num_shared_chunks += other.num_shared_chunks
        self.num_streamed += other.num_streamed
        self.most_kvp_ranks = max(self.most_kvp_ranks, other.most_kvp_ranks)
        self.largest_error = max(self.largest_error, other.largest_error)


class Walk:
    """The front's part over RankProcesses: one case from its first request to its last token."""

    def __init__(self, case: Case, ranks: RankProcesses, checkpoint: Path) -> None:
        self.case, self.ranks = case, ranks
        self.layout = case.layout
        ready, *_ = ranks.load(
            RankConfig(
                layout=case.layout, server_endpoint="", checkpoint=str(checkpoint),
                model=ModelOptions(device="cpu", dtype="float32", block_size=case.block_size, num_threads=1),
                kv_memory_bytes=KV_BYTES, max_tokens_per_shard=case.shard_tokens,
            )  # fmt: skip
        )
        assert ready.num_blocks >= case.num_blocks
        shape = ModelShape(
            name="tiny", num_layers=2, hidden_size=64, ffn_hidden_size=128, num_heads=4, num_kv_heads=2, head_dim=16,
            vocab_size=256, max_context_len=400,
        )  # fmt: skip
        self.scheduler = Scheduler(
            case.scheduler,
            RooflineCost(shape=shape, hardware=SLOW),
            KVMemory(
                case.num_blocks, case.block_size, 4096, kvp=case.layout.kvp, max_tokens_per_shard=case.shard_tokens,
                kv=case.kv,
            ),  # fmt: skip
            spp=case.layout.spp,
        )
        self.rng = random.Random(case.seed)
        self.now_s = 0.0
        self.clients = {request.request_id: Client() for request in case.requests}
        self.known: list[set[str]] = [set() for _ in range(self.layout.kvp)]          # by kvp rank
        self.unsent: list[list[tuple[str, int]]] = [[] for _ in range(self.layout.kvp)]
        self.batches: dict[int, Batch] = {}
        self.in_first_stage: deque[int] = deque()  # of those, where there is more than one stage
        self.done: dict[tuple[int, int], list[Answer]] = {}  # by batch and stage
        self.sampled: dict[str, tuple[SampledToken, np.ndarray]] = {}
        self.outcome = Outcome()
        self.preempted: set[str] = set()
        self.keys: dict[str, GranuleKeys] = {}
        if case.kv.prefix_cache:
            for name, prompt in case.prompts.items():
                self.keys[name] = GranuleKeys(KEY_ROOT, case.kv.tokens_per_granule(case.block_size))
                self.keys[name].extend(array("i", prompt))

    def run(self) -> Outcome:
        """To the end. Raises AssertionError on a deadlock, a lost request or a broken rule of the messages."""
        waiting = list(self.case.requests)
        aborted = dict(self.case.aborted)
        while waiting or self.scheduler.num_sequences:
            if not self.batches and waiting:
                self.now_s = max(self.now_s, waiting[0].arrival_s)
            while waiting and waiting[0].arrival_s <= self.now_s:
                self.handle(Arrived(waiting.pop(0)))
            arrived = {request.request_id for request in self.case.requests} - {r.request_id for r in waiting}
            for request_id in [r for r, count in aborted.items() if self.outcome.num_batches >= count and r in arrived]:
                del aborted[request_id]
                self.handle(Aborted(request_id))
                self.clients[request_id].has_ended = True
            while (batch := self.scheduler.schedule(self.now_s)) is not None:
                self.submit(batch)
            if self.batches:
                self.advance()
            else:
                assert waiting or not self.scheduler.num_sequences, "live requests, and no batch can be formed"
        return self.outcome

    def submit(self, batch: Batch) -> None:
        """One Step to every rank, as the messages' rules say."""
        self.outcome.num_batches += 1
        self.outcome.num_streamed += bool(self.batches)
        self.outcome.num_shared_chunks += sum(len(chunk.kvp_ranks) > 1 for chunk in batch.chunks)
        self.outcome.most_kvp_ranks = max(
            self.outcome.most_kvp_ranks, *(len(chunk.kvp_ranks) for chunk in batch.chunks)
        )
        self.batches[batch.batch_id] = batch
        for op in batch.kv_ops:
            if op.kind == "append" and op.request_id in self.preempted:
                self.preempted.discard(op.request_id)
                (start,) = (chunk.start for chunk in batch.chunks if chunk.request_id == op.request_id)
                self.outcome.num_resumed_behind += start > 0
        if self.layout.spp > 1:
            self.in_first_stage.append(batch.batch_id)
        for kvp in range(self.layout.kvp):
            chunks = batch.chunks_on(kvp)
            self.known[kvp].difference_update(batch.released)
            kv_ops = tuple(op for op in batch.kv_ops if is_for(op, kvp))
            begun = dict.fromkeys(op.request_id for op in kv_ops if op.kind == "append")
            new = [request_id for request_id in begun if request_id not in self.known[kvp]]
            self.known[kvp].update(new)
            sampled = [(r, token) for r, token in self.unsent[kvp] if r in self.known[kvp] and r not in new]
            self.unsent[kvp].clear()
            self.ranks.send_to_kvp_rank(
                kvp,
                RankStep(
                    batch.batch_id, chunks, tuple(map(self.new_request, new)), batch.released, tuple(sampled), kv_ops
                ),  # fmt: skip
            )

    def new_request(self, request_id: str) -> NewRequest:
        """All tokens known by now."""
        prompt = self.case.prompts[request_id]
        token_ids = array("i", prompt + self.clients[request_id].tokens)
        return NewRequest(request_id, token_ids.tobytes(), len(prompt), self.case.sampling[request_id])

    def advance(self) -> None:
        """A batch leaves the first stage, or the oldest the last one: which of the two is drawn."""
        oldest = next(iter(self.batches))
        if self.in_first_stage and (self.in_first_stage[0] == oldest or self.rng.random() < 0.5):
            batch_id = self.in_first_stage.popleft()
            self.answers_of(batch_id, 0)
            self.handle(FirstStageDone(batch_id))
        else:
            self.complete(oldest)

    def answers_of(self, batch_id: int, stage: int) -> list[Answer]:
        """What all kvp ranks of a stage have said of a batch, by rank; waits for it, and keeps what else comes."""
        found = self.done.setdefault((batch_id, stage), [])
        while len(found) < self.layout.kvp:
            for answer in self.ranks.answers():
                coord = self.layout.coord_of(answer.done.rank)
                assert coord.tp == 0
                self.done.setdefault((answer.done.batch_id, coord.spp), []).append(answer)
        return sorted(found, key=lambda answer: answer.done.rank)

    def complete(self, batch_id: int) -> None:
        """The last stage is done on every kvp rank."""
        answers = self.answers_of(batch_id, self.layout.spp - 1)
        batch = self.batches.pop(batch_id)
        failed: list[tuple[str, str]] = []
        for answer in answers:
            failed += self.results(answer, batch, self.layout.coord_of(answer.done.rank))
        duration_s = self.rng.choice((0.5, 1.0, 2.0)) * batch.predicted_s
        self.now_s += duration_s
        filled = tuple((name, key) for name, (token, _) in self.sampled.items() if (key := self.key(name, token)))
        # A request on several kvp ranks fails on all of them alike.
        self.handle(
            Completed(
                batch_id=batch_id, duration_s=duration_s, failed=tuple(dict.fromkeys(failed)), filled_keys=filled
            )
        )
        self.sampled.clear()  # of requests that were aborted meanwhile

    def key(self, request_id: str, token: SampledToken) -> bytes:
        """Of the granule that a token fills; empty if it fills none."""
        keys = self.keys.get(request_id)
        return b"" if keys is None or self.clients[request_id].has_ended else keys.append(token.token_id)

    def results(self, answer: Answer, batch: Batch, coord: Coord) -> list[tuple[str, str]]:
        """Note tokens, logits and log-probabilities; returns the failed."""
        done: StepDone = answer.done
        kvp_ranks = {chunk.request_id: chunk.kvp_ranks for chunk in batch.chunks}
        logits_RV = answer.logits_RV if answer.logits_RV is not None else np.empty((0, VOCAB_SIZE))
        for token, logits_V in zip(done.tokens, logits_RV, strict=True):
            assert kvp_ranks[token.request_id][-1] == coord.kvp, "sampled by a rank that is not its last"
            self.sampled[token.request_id] = (token, logits_V[:VOCAB_SIZE])
        for part in done.prompt_logprobs:
            for offset, logprobs in enumerate(part.logprobs):
                self.clients[part.request_id].prompt_logprobs[part.first_position + offset] = logprobs
        return list(done.failed)

    def handle(self, event: Event) -> None:
        """The scheduler's answer to an event, told to the clients."""
        for output in self.scheduler.handle(event, self.now_s):
            self.tell(output)

    def tell(self, output: Output) -> None:
        """One output."""
        match output:
            case TokenOut(request_id, _, finish_reason, num_cached_tokens):
                self.outcome.num_cached_tokens += num_cached_tokens
                client = self.clients[request_id]
                assert not client.has_ended, f"{request_id}: a token after its end"
                token, logits_V = self.sampled.pop(request_id)
                client.tokens.append(token.token_id)
                client.logits.append(logits_V)
                client.has_ended = finish_reason is not None
                self.outcome.num_tokens += 1
                if self.layout.world_size == 1:
                    return  # the rank sampled it itself
                for kvp in range(self.layout.kvp):
                    if request_id in self.known[kvp] and not client.has_ended:
                        self.unsent[kvp].append((request_id, token.token_id))
            case Preempted():
                self.outcome.num_preempted += 1
                self.preempted.add(output.request_id)
            case Rejected(request_id, why, _):
                self.clients[request_id].rejected = why
                self.clients[request_id].has_ended = True

    def check(self, reference: Reference) -> None:
        """All tokens and logits against the plain forward. Raises AssertionError naming the first that differs."""
        for request in self.case.requests:
            request_id = request.request_id
            client, prompt = self.clients[request_id], self.case.prompts[request_id]
            assert client.has_ended, f"{request_id} has not ended"
            if max(prompt) >= VOCAB_SIZE:
                assert client.rejected is not None or request_id in self.case.aborted
                assert not client.tokens
                continue
            assert client.rejected is None, f"{request_id}: {client.rejected}"
            if request_id not in self.case.aborted:
                assert len(client.tokens) == request.max_output_tokens
            self.compare(request_id, prompt, client, reference(prompt + client.tokens))

    def compare(self, request_id: str, prompt: list[int], client: Client, expected_TV: np.ndarray) -> None:
        """One request."""
        scale = float(np.abs(expected_TV).max())
        penalty = self.case.sampling[request_id].presence_penalty
        for index, (token_id, logits_V) in enumerate(zip(client.tokens, client.logits, strict=True)):
            expected_V = expected_TV[len(prompt) - 1 + index]
            error = float(np.abs(logits_V - expected_V).max()) / scale
            self.outcome.largest_error = max(self.outcome.largest_error, error)
            assert error < RELATIVE_TOLERANCE, f"{request_id}, output {index}: logits differ by {error:.1e}"
            penalised_V = expected_V.copy()
            penalised_V[list(set(client.tokens[:index]))] -= penalty
            assert token_id == penalised_V.argmax(), f"{request_id}, output {index}: {token_id} is not the greedy token"
        if self.case.sampling[request_id].num_prompt_logprobs is not None and client.tokens:
            logprobs_TV = torch.from_numpy(expected_TV).double().log_softmax(-1)
            for position in range(1, len(prompt)):
                found = client.prompt_logprobs[position]
                expected = float(logprobs_TV[position - 1, prompt[position]])
                assert found.token_id == prompt[position]
                error = abs(found.logprob - expected) / scale
                assert error < RELATIVE_TOLERANCE, f"{request_id}, prompt {position}: log-probability differs"


def walk(case: Case, ranks: RankProcesses, checkpoint: Path, reference: Reference) -> Outcome:
    """Run a case and compare it."""
    run = Walk(case, ranks, checkpoint)
    run.run()
    run.check(reference)
    return run.outcome


_DEGREES = [*itertools.product((1, 2), repeat=3), (1, 1, 3), (1, 1, 4), (1, 4, 1)]
LAYOUTS = {
    f"tp={tp} spp={spp} kvp={kvp}": ParallelLayout(tp=tp, spp=spp, kvp=kvp) for tp, spp, kvp in _DEGREES
}
