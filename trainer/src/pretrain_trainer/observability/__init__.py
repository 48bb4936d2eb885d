"""What a step took, and what became of a rank."""
