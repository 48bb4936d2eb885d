"""The pretrain command."""
