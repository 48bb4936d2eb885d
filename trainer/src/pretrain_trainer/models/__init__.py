"""What is trained: the decoder, its parts, what it minimises and by what."""
