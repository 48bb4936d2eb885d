"""Scratch folders, by the name that the trainer's programs know: see `pretrain_agent.scratch`."""

from pretrain_agent.scratch import Scratch, remove_abandoned

__all__ = ["Scratch", "remove_abandoned"]
