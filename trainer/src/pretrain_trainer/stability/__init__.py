"""Losses that diverge: noticing them, and going back."""
