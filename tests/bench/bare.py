"""The baseline of training: a bare torch loop over ready tokens, by itself or as one rank of torchrun's DDP.

    python tests/bench/bare.py WIDTH LAYERS HEADS MLP CODES TOKENS SENTENCES STEPS PRECISION
    python -m torch.distributed.run --nproc-per-node 2 tests/bench/bare.py ...

A stock `LlamaForCausalLM` with attention bias, torch's sdpa and fused AdamW, gradients clipped to 1, SENTENCES a step on all
ranks together. Weights and moments are of the precision too: in bf16 that is less work than the fp32 masters of ours. Prints a
line a step.
"""

from __future__ import annotations

import os
import sys

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
    width, layers, heads, mlp, codes, tokens, sentences, steps = map(int, sys.argv[1:-1])
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[sys.argv[-1]]
    world = int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=codes,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=tokens,
        attention_bias=True,
        attn_implementation="sdpa",
        bos_token_id=None,
        eos_token_id=None,
    )
    model: torch.nn.Module = LlamaForCausalLM(config).to(dtype)
    if world > 1:
        torch.distributed.init_process_group("gloo")
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    ready = torch.randint(0, codes, (64, sentences // world, tokens))
    for step in range(steps):
        batch = ready[step % len(ready)]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if int(os.environ.get("RANK", "0")) == 0:
            print(step + 1, loss.item(), flush=True)


if __name__ == "__main__":
    main()
