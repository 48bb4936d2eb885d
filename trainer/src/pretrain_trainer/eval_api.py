"""The API of user-defined evaluations, `training.evaluation.hook`. Names here are stable between versions."""

from __future__ import annotations

from pretrain_trainer.evaluation.trained_model import Trained

__all__ = ["Trained"]
