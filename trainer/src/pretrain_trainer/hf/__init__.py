"""Weights from and for elsewhere: other runs, and Hugging Face."""
