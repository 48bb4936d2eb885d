"""Import and export of weights: other runs' checkpoints, and Hugging Face's format."""
