"""The decoder, its parts, its loss and its optimizer."""
