"""Checkpoints: verified restore, asynchronous save, both through the object store."""

from pretrain_trainer.checkpoint.checkpointer import Checkpointer

__all__ = ["Checkpointer"]
