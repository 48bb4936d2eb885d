"""Sampling of texts from the model."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer

from pretrain_api.spec.data import Sampling
from pretrain_trainer.core.errors import InvalidInput
from pretrain_trainer.parallelism.forward_backward import Passes

START_TOKENS = ("<|endoftext|>", "</s>", "<s>")
"""Start-of-text tokens of common tokenisers; the first one found replaces an empty prompt."""


def parse_tokenizer(tokenizer: bytes) -> Tokenizer:
    """Parse tokenizer.json. Raises InvalidInput."""
    try:
        return Tokenizer.from_str(tokenizer.decode())
    except Exception as error:  # the library raises plain Exception
        raise InvalidInput(f"training.data.tokenizer is no tokenizer.json ({error}): name a valid one") from error


def sample(passes: Passes, tokenizer: Tokenizer, prompt: str, sampling: Sampling, context: int, seed: int) -> str:
    """Sample `sampling.tokens` tokens after the prompt from a model in evaluation mode. Collective in a replica.

    The text is a function of the seed and the weights, equal on all ranks of a replica. The generator is its own.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = tokenizer.encode(prompt, add_special_tokens=False).ids or [_start(tokenizer)]
    prompt_length = len(tokens)
    for _ in range(sampling.tokens):
        recent = torch.tensor(tokens[-context:])
        logits = passes.next_logits(recent)[: tokenizer.get_vocab_size()].float().cpu()
        weights = torch.softmax(logits / sampling.temperature, dim=0)
        tokens.append(int(torch.multinomial(weights, 1, generator=generator)))
    return tokenizer.decode(tokens[prompt_length:])


def _start(tokenizer: Tokenizer) -> int:
    found = (tokenizer.token_to_id(token) for token in START_TOKENS)
    return next((token for token in found if token is not None), 0)
