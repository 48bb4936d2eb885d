"""Document masking: attention that does not cross the ends of documents."""

from __future__ import annotations

from tokenizers import Tokenizer
from torch import Tensor

from pretrain_trainer.core.errors import InvalidInput

END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>")
"""Tokens that end a document in common tokenisers; our own writer of shards uses the first."""


def end_of_document(tokenizer: Tokenizer) -> int:
    """Return the token that ends a document. Raises InvalidInput when the tokeniser has none."""
    found = (tokenizer.token_to_id(token) for token in END_TOKENS)
    end = next((token for token in found if token is not None), None)
    if end is None:
        raise InvalidInput(
            f"training.data.maskDocuments: the tokeniser has none of {', '.join(END_TOKENS)} to end a document with: "
            "set it to false, or use a tokeniser that has one"
        )
    return end


def same_document(tokens: Tensor, end: int) -> Tensor:
    """Return the mask (batch, 1, time, time): true for a position itself and earlier ones of the same document.

    The token `end` is the last one of its document.
    """
    ends = tokens == end
    document = ends.cumsum(1) - ends.long()
    return (document[:, :, None] == document[:, None, :]).tril()[:, None]
