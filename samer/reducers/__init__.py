"""Fewer tokens inside a vision tower: a room that is still empty."""
