"""Tokenised datasets: `writer` writes them, `verification` reads and verifies them. numpy and tokenizers only."""
