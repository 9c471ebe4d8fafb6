"""Data: shard sets and their index, sources and generated scenes, the order of training, views, loader."""
