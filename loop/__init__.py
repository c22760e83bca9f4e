"""The training loop, one file per idea. Imports nothing: `loop.shards` and `loop.reduction` are used without torch."""
