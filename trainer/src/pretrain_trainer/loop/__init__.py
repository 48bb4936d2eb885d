"""The training loop and its set-up."""
