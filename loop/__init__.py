"""The training loop, a room per idea. Imports nothing: `loop.shards` and `loop.reduction` are used without torch."""
