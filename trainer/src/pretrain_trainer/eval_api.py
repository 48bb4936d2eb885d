"""What a user's evaluation sees of a run: the model as it is trained so far. Names here stay from version to version.

All ranks call the user's function, and every method here takes all of them: an evaluation calls the same ones, as often
and with the same arguments, on every rank, and gets the same answers. Each call begins with a look whether that is so.
Where it is not, or where the function failed on a rank, all ranks give it up together: none waits for another.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch import Tensor

from pretrain_trainer.core.progress import Progress
from pretrain_trainer.evaluation.held_out import HeldOut, evaluate
from pretrain_trainer.loop.setup import Run
from pretrain_trainer.models.decoder import Decoder
from pretrain_trainer.parallelism.gradients import all_reduce

DIFFERENT = "ranks called different methods of `trained`, or with different arguments: call the same on every rank"
ELSEWHERE = "it failed on another rank"


class GivenUp(Exception):
    """The evaluation is over on all ranks; the message says why."""


class Meeting:
    """Where the ranks of one evaluation meet: all at the same call, or none goes on."""

    def __init__(self) -> None:
        self.over = ""
        """Why it is over; empty: it is not."""

    def at(self, call: str, arguments: bytes = b"", *, failed: bool = False) -> None:
        """Come to a call, or say that this rank `failed`. Collective. Raises GivenUp on all ranks alike."""
        if self.over:
            raise GivenUp(self.over)
        here = zlib.crc32(call.encode() + b"\0" + arguments)
        seen = torch.tensor([here, -here, int(failed)])
        all_reduce(seen, dist.ReduceOp.MAX)
        most, least, failures = seen.tolist()
        if failures:
            self.over = ELSEWHERE
        elif most != -least:
            self.over = DIFFERENT
        if self.over:
            raise GivenUp(self.over)


class Trained:
    """The model after `step` steps on `tokens` tokens, at rest: no dropout, no gradients. It must not be changed."""

    def __init__(self, run: Run, progress: Progress, meeting: Meeting) -> None:
        self._run = run
        self._meeting = meeting
        self.step: int = progress.step
        self.tokens: int = progress.tokens
        self.tokenizer: Tokenizer = run.tokenizer
        self.context: int = run.model.context
        """The most tokens that the model looks back on."""
        self.model: Decoder = run.model
        """This rank's part of it; with plain data parallel that is all of it. It can be called wherever it is whole."""
        self.device: torch.device = run.ranks.device
        self.rank: int = run.ranks.rank
        self.world_size: int = run.ranks.world_size

    @property
    def first(self) -> bool:
        """Whether this is the rank whose answer counts; the one to print or to write a file."""
        return self._run.ranks.first

    def loss(self, windows: Tensor) -> float:
        """Mean loss in nats per token over windows (number, length) of tokens, 2 <= length <= context + 1. The same at
        any number of replicas, which share the windows out. Collective; ValueError for what are no such windows."""
        return self._mean_losses((HeldOut("", self._checked(windows).split(self._run.training.batch.micro_batch)),))[0]

    def losses(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """The loss in nats of each sequence of tokens, of any length up to context + 1, summed over all its tokens but
        the first. Each is computed by itself; the replicas share them out. Collective.

        The loss of a continuation is the difference between that of the whole and that of the beginning.
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
        """Logits (vocabulary) of the token after these, in fp32 on the CPU; of more than `context` tokens the last
        count. Every replica computes them. Collective."""
        recent = self._tokens(torch.tensor(list(tokens)[-self.context :]))
        if not len(recent):
            raise ValueError("next_logits needs a token to begin with: give at least one")
        self._meeting.at("next_logits", recent.numpy().tobytes())
        return self._run.passes.next_logits(recent)[: self.tokenizer.get_vocab_size()].float().cpu()

    def _mean_losses(self, held_out: Sequence[HeldOut]) -> list[float]:
        run = self._run
        batches = [batch for source in held_out for batch in source.micro_batches]
        self._meeting.at("losses", b"".join(batch.numpy().tobytes() for batch in batches))
        if not batches:
            return []
        return [*evaluate(run.passes.loss, held_out, run.ranks, run.gradients.padded).values()]

    def _checked(self, windows: Tensor) -> Tensor:
        windows, parts = self._tokens(windows), self._run.ranks.place.parts
        if windows.dim() != 2 or not len(windows) or not 2 <= windows.shape[1] <= self.context + 1:
            shape = tuple(windows.shape)
            raise ValueError(f"windows {shape} are not (number, 2 to {self.context + 1} tokens): cut them so")
        if (windows.shape[1] - 1) % parts:
            raise ValueError(f"{parts} tensor ranks need windows of a multiple of {parts} tokens and one more")
        return windows

    def _tokens(self, tokens: Tensor) -> Tensor:
        """An index out of range would end a process with a GPU."""
        tokens = torch.as_tensor(tokens).long().cpu().contiguous()
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self._run.model.rows:
            raise ValueError(f"tokens must be from 0 to {self._run.model.rows - 1}")
        return tokens
