"""Evaluation hooks for tests, called by ranks: `support.trainer.hooks:function`, or this file's path."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from pretrain_trainer.eval_api import Trained

WINDOWS = torch.arange(7 * 17).reshape(7, 17) % 61
"""More than a micro-batch, and no multiple of one."""
SEQUENCES = [[1, 2, 4, 5], [7, 8], list(range(17)), [3, 4, 6]]
"""For two tensor ranks every one must be of a multiple of two tokens and one more."""


def looks(trained: Trained) -> Mapping[str, float]:
    """Uses all that it is given, and is as careless as it may be with what it is not."""
    torch.manual_seed(trained.step)
    random.random()
    np.random.rand(3)
    first, again = (trained.loss(WINDOWS) for _ in range(2))
    assert first == again, "dropout"
    losses = trained.losses(SEQUENCES)
    assert trained.losses([[3], [1, 2]])[0] == 0
    logits = trained.next_logits([1, 2, 4])
    trained.model.train()
    torch.set_num_threads(2)
    return {
        "loss": first,
        "apart": sum(losses[:2]),
        "long/mean": losses[2] / 16,
        "likely": int(logits.argmax()),
        "largest": logits.max(),
        "tokens": trained.tokens,
        "rows": np.float32(len(logits)),
    }


def laid_out(trained: Trained) -> Mapping[str, float]:
    """What any parallelism can do."""
    losses = trained.losses([list(range(17)), list(range(5))])
    return {"loss": trained.loss(WINDOWS), "short": losses[1], "largest": trained.next_logits([1, 2, 4]).max()}


def errs(trained: Trained) -> Any:
    """Another mistake after each step."""
    match trained.step:
        case 1:
            raise KeyError("the same on all ranks")
        case 2 if trained.rank == 1:
            raise ConnectionRefusedError("on one rank, before the others call")
        case 2:
            return {"loss": trained.loss(WINDOWS)}
        case 3:
            return {"loss": float("nan")}
        case 4:
            return {"loss": trained.loss(WINDOWS[trained.rank :])}
        case 5 if trained.rank == 1:
            return {}
        case 5:
            return {"loss": trained.loss(WINDOWS)}
        case 6:
            return [1.0]
        case 7:
            return {f"m{number}": 1.0 for number in range(33)}
        case 8:
            return {"a name": 1.0}
        case 9:
            return {"text": "1.0"}
        case 10:
            return {"loss": trained.loss(WINDOWS + 1000)}
        case 11:
            raise SystemExit(3)
        case 12 if trained.rank == 1:
            raise RuntimeError("on one rank, where the others call nothing")
        case _:
            return {"good": 1.0}
