"""Two ranks of DeepSpeed's ZeRO engine on the CPU, one step of training, one checkpoint; run as a program."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path
from typing import Any

NUM_RANKS = 2


def megatron_model(groups: Any) -> tuple[Any, Any]:
    """A small GPTModel for training, and the arguments that Megatron-DeepSpeed would save with it."""
    import torch

    from megatron_medha.model.build import build_model
    from megatron_medha.models.megatron_args import args_from_config
    from megatron_medha.models.model_config import ModelConfig

    config = ModelConfig(
        name="small", num_layers=2, hidden_size=64, ffn_hidden_size=96, num_heads=4, num_kv_heads=2, head_dim=16,
        vocab_size=101, max_context_len=256, norm_epsilon=1e-6, rope_theta=10000.0,
    )  # fmt: skip
    model = build_model(config, dtype=torch.float32, device=torch.device("cpu"), pgs=groups)
    return model.train(), args_from_config(config, torch.float32)


def train(rank: int, meeting: str, directory: Path, stage: int, kind: str) -> None:
    """One rank's part."""
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK="0", RANK=str(rank), WORLD_SIZE=str(NUM_RANKS))
    import deepspeed
    import torch
    import torch.distributed as dist

    # It would be compiled for half a minute, for messages that this test does not send.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=NUM_RANKS)
    torch.manual_seed(0)
    args = None
    if kind == "megatron":
        from megatron_medha.core.layout import ParallelLayout
        from megatron_medha.parallel.groups import build_groups

        model, args = megatron_model(build_groups(ParallelLayout(dp=NUM_RANKS)))
    else:
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    ids = torch.randint(0, 101, (1, 24), generator=torch.Generator().manual_seed(rank))
    logits = engine(ids, None, None) if kind == "megatron" else engine(ids).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2).float()[:-1], ids.flatten()[1:])
    engine.backward(loss)
    engine.step()
    engine.save_checkpoint(str(directory), client_state={} if args is None else {"args": args})
    # What the trained model answers, for those who load it.
    engine.eval()
    with torch.no_grad():
        ids = torch.arange(40).view(1, 40)
        logits = engine(ids, None, None) if kind == "megatron" else engine(ids).logits
    if rank == 0:
        torch.save(logits.float(), directory / "expected.pt")
    dist.barrier()


def main() -> int:
    """All ranks, forked."""
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--stage", type=int, required=True)
    parser.add_argument("--kind", choices=("megatron", "transformers"), required=True)
    args = parser.parse_args()
    if args.kind == "megatron":
        import megatron_medha.model.build  # noqa: F401  before the fork: it takes seconds
    children = []
    for rank in range(NUM_RANKS):
        if not (pid := os.fork()):
            try:
                train(rank, str(args.directory / "meeting"), args.directory, args.stage, args.kind)
            except BaseException as error:
                print(rank, repr(error), file=sys.stderr, flush=True)
                os._exit(1)
            sys.stdout.flush()
            os._exit(0)
        children.append(pid)
    return max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children)


if __name__ == "__main__":
    sys.exit(main())
