"""Former name of `pretrain_trainer.eval_api`, for evaluation hooks that import it."""

from pretrain_trainer.eval_api import Trained

__all__ = ["Trained"]
