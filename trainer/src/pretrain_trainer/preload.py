"""Imports all that a rank needs, and does nothing else: for the process from which ranks are forked.

torch._dynamo is in it because the first optimizer of a process imports it (1.3 s), whether compiled or not.
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
