"""Stored embeddings of whatever model, read, merged and written back: no model is needed, so every model is served.

A *place* names where embeddings lie: a file, a folder, or a collection of a database. `samer.vectors.places` lists the
kinds; each is a file beside this one.
"""
