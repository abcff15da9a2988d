"""The built-in world: generated scenes, and the small retriever made for them."""
