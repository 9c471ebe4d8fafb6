"""The AKOrN family: K-layers, backbones in timm's form, controls, Sudoku, classifier, published checkpoints.

Model files know nothing of configs, parallelism or logging.
"""
