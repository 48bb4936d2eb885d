"""Baseline: GPT-2 and its training loop in plain PyTorch, after nanoGPT (Karpathy)."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from harness import ROOT

from pretrain_api.spec.model import ResolvedModel

SOURCE = ROOT / "examples/data/code"
LOG_EVERY = 10


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.c_fc, self.mlp_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        query, key, value = self.c_attn(self.ln_1(x)).split(width, dim=2)
        query, key, value = (
            part.view(batch, time, self.heads, width // self.heads).transpose(1, 2) for part in (query, key, value)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.c_proj(mixed.transpose(1, 2).contiguous().view(batch, time, width))
        return x + self.mlp_proj(functional.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class Gpt(nn.Module):
    def __init__(self, layers: int, heads: int, width: int, context: int, rows: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(rows, width), nn.Embedding(context, width)
        self.h = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, rows, bias=False)
        self.lm_head.weight = self.wte.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                deviation = 0.02 / math.sqrt(2 * layers) if name.endswith("proj.weight") else 0.02
                nn.init.normal_(parameter, 0.0, deviation)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return functional.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1))


class PlainLoop:
    """Training loop: gradient accumulation, clipping, fused AdamW, a cosine schedule; reads the loss rarely."""

    def __init__(
        self, shape: ResolvedModel, rows: int, micro_batch: int, micro_batches: int, device: str, compiled: bool
    ) -> None:
        torch.manual_seed(1)
        self.context, self.device = shape.context, device
        self.micro_batch, self.micro_batches = micro_batch, micro_batches
        self.model: Any = Gpt(shape.layers, shape.heads, shape.width, shape.context, rows).to(device)
        matrices = [parameter for parameter in self.model.parameters() if parameter.dim() >= 2]
        vectors = [parameter for parameter in self.model.parameters() if parameter.dim() < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=True)
        if compiled:
            self.model = torch.compile(self.model)
        self.data = np.memmap(SOURCE / "00000.bin", dtype=np.uint16, mode="r")
        self.autocast = torch.autocast("cuda", torch.bfloat16) if device == "cuda" else nullcontext()

    def train(self, steps: int, done: Callable[[], None]) -> None:
        for step in range(steps):
            for group in self.optimizer.param_groups:
                group["lr"] = 6e-5 + 0.5 * (1 + math.cos(math.pi * step / steps)) * 5.4e-4
            for _ in range(self.micro_batches):
                tokens, targets = self.batch()
                with self.autocast:
                    loss = self.model(tokens, targets) / self.micro_batches
                loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if step % LOG_EVERY == 0 or step == steps - 1:
                loss.item()
            done()

    def batch(self) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(self.data) - self.context - 1, (self.micro_batch,)).tolist()
        rows = [torch.from_numpy(self.data[start : start + self.context + 1].astype(np.int64)) for start in starts]
        windows = torch.stack(rows)
        if self.device == "cuda":
            windows = windows.pin_memory().to(self.device, non_blocking=True)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
