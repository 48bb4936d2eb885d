"""Values and primitives that every part of the trainer uses."""
