"""The model that a user-defined evaluation receives, and the check that all ranks call it alike.

All ranks call the user's function, and every method here is collective: an evaluation calls the same methods, equally
often and with the same arguments, on every rank, and gets the same results. Each call first compares its arguments over
the ranks. Where they differ, or where the function failed on a rank, all ranks abandon the evaluation and none hangs.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch import Tensor

from pretrain_trainer.core.progress import TrainingProgress
from pretrain_trainer.core.ranks import Ranks
from pretrain_trainer.evaluation.held_out import HeldOut, evaluate
from pretrain_trainer.models.decoder import Decoder
from pretrain_trainer.parallelism.forward_backward import Passes
from pretrain_trainer.parallelism.gradients import all_reduce

DIFFERENT = "ranks called different methods of `trained`, or with different arguments: call the same on every rank"
ELSEWHERE = "it failed on another rank"


@dataclass(frozen=True)
class EvaluatedModel:
    """A model laid out over the ranks, with its tokeniser."""

    model: Decoder
    passes: Passes
    tokenizer: Tokenizer
    ranks: Ranks
    micro_batch: int
    padded: bool
    """True where all ranks must run the model equally often, as sharded parameters need."""


class EvaluationAbandoned(Exception):
    """The evaluation ended early on all ranks; the message says why."""


class CallMatcher:
    """Compares the calls of one evaluation over the ranks: all ranks make the same call, or none continues."""

    def __init__(self) -> None:
        self.abandoned = ""
        """The reason for abandoning the evaluation; empty while it runs."""

    def match(self, call: str, arguments: bytes = b"", *, failed: bool = False) -> None:
        """Announce a call, or that this rank `failed`. Collective. Raises EvaluationAbandoned on all ranks alike."""
        if self.abandoned:
            raise EvaluationAbandoned(self.abandoned)
        here = zlib.crc32(call.encode() + b"\0" + arguments)
        seen = torch.tensor([here, -here, int(failed)])
        all_reduce(seen, dist.ReduceOp.MAX)
        most, least, failures = seen.tolist()
        if failures:
            self.abandoned = ELSEWHERE
        elif most != -least:
            self.abandoned = DIFFERENT
        if self.abandoned:
            raise EvaluationAbandoned(self.abandoned)


class Trained:
    """The model after `step` steps on `tokens` tokens, in evaluation mode without gradients. Must not be modified."""

    def __init__(self, evaluated: EvaluatedModel, progress: TrainingProgress, matcher: CallMatcher) -> None:
        self._evaluated = evaluated
        self._matcher = matcher
        self.step: int = progress.step
        self.tokens: int = progress.tokens
        self.tokenizer: Tokenizer = evaluated.tokenizer
        self.context: int = evaluated.model.context
        """Length of the context, in tokens."""
        self.model: Decoder = evaluated.model
        """This rank's part of the model; all of it with plain data parallelism. Call it only where it is whole."""
        self.device: torch.device = evaluated.ranks.device
        self.rank: int = evaluated.ranks.rank
        self.world_size: int = evaluated.ranks.world_size

    @property
    def first(self) -> bool:
        """True on the rank whose metrics are reported; the one to print or to write files."""
        return self._evaluated.ranks.first

    def loss(self, windows: Tensor) -> float:
        """Return the mean loss in nats per token of windows (number, length) of tokens, 2 <= length <= context + 1.

        The replicas divide the windows; the result is the same at any number of replicas. Collective. Raises ValueError
        for windows of another shape.
        """
        return self._mean_losses((HeldOut("", self._checked(windows).split(self._evaluated.micro_batch)),))[0]

    def losses(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """Return the loss in nats of each sequence of at most context + 1 tokens, summed over all but the first token.

        Each is computed by itself; the replicas divide them. Collective. The loss of a continuation is the loss of the
        whole minus the loss of the prompt.
        """
        if not all(sequences):
            raise ValueError("a sequence without a token has no loss: leave it out")
        longer = [number for number, sequence in enumerate(sequences) if len(sequence) > 1]
        held_out = [
            HeldOut(str(number), (self._checked(torch.tensor([list(sequences[number])])),)) for number in longer
        ]
        summed = [0.0] * len(sequences)
        for number, mean, source in zip(longer, self._mean_losses(held_out), held_out, strict=True):
            summed[number] = mean * source.targets
        return summed

    def next_logits(self, tokens: Sequence[int]) -> Tensor:
        """Return the logits (vocabulary) of the token after these, in fp32 on the CPU. Collective.

        Only the last `context` tokens count. Every replica computes them.
        """
        recent = self._tokens(torch.tensor(list(tokens)[-self.context :]))
        if not len(recent):
            raise ValueError("next_logits needs a prompt: give at least one token")
        self._matcher.match("next_logits", recent.numpy().tobytes())
        return self._evaluated.passes.next_logits(recent)[: self.tokenizer.get_vocab_size()].float().cpu()

    def _mean_losses(self, held_out: Sequence[HeldOut]) -> list[float]:
        evaluated = self._evaluated
        batches = [batch for source in held_out for batch in source.micro_batches]
        self._matcher.match("losses", b"".join(batch.numpy().tobytes() for batch in batches))
        if not batches:
            return []
        return [*evaluate(evaluated.passes.loss, held_out, evaluated.ranks, evaluated.padded).values()]

    def _checked(self, windows: Tensor) -> Tensor:
        windows, parts = self._tokens(windows), self._evaluated.ranks.place.parts
        if windows.dim() != 2 or not len(windows) or not 2 <= windows.shape[1] <= self.context + 1:
            shape = tuple(windows.shape)
            raise ValueError(f"windows {shape} are not (number, 2 to {self.context + 1} tokens): cut them so")
        if (windows.shape[1] - 1) % parts:
            raise ValueError(f"{parts} tensor ranks need windows of a multiple of {parts} tokens and one more")
        return windows

    def _tokens(self, tokens: Tensor) -> Tensor:
        """Check the range: an index out of range would end a process with a GPU."""
        tokens = torch.as_tensor(tokens).long().cpu().contiguous()
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self._evaluated.model.rows:
            raise ValueError(f"tokens must be from 0 to {self._evaluated.model.rows - 1}")
        return tokens
