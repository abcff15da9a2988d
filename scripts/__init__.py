"""The entry points; installed, they are `samer.scripts` and the commands samer-train, samer-cache, ... (pyproject)."""
