"""Command-line interface: `pretrain` and its commands."""
