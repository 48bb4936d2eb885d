"""Imports of a rank, for the process that ranks are forked from.

They include torch._dynamo, which the first optimizer of a process imports (1.3 s), compiled or not.
"""

import tokenizers  # noqa: F401
import torch
import torch._dynamo
import torch.distributed
import torch.distributed.checkpoint
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp
import torch.distributed.tensor
import torch.optim  # noqa: F401

import pretrain_trainer.checkpoint
import pretrain_trainer.loop.train
import pretrain_trainer.observability.failures  # noqa: F401
