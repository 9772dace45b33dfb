"""Resumable loading: the cursor of a rank in its loops, and the loops that keep and use it."""
