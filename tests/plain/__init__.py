"""A plain transcription of AKOrN: images as [B, C, H, W], 1x1 convolutions, nothing of the product's own modules.

It exists to be independent: golden files are made with it, and it is the baseline of the benchmarks. Hence it works the
slow way throughout: components are the fastest channel index, norms run over a small strided dimension, and the loss
holds the whole matrix. Parameters carry the names of the published code's state dicts, so that recorded ones load.
"""
