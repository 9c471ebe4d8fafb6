"""Pretraining of AKOrN backbones. Importing this package registers its models with timm."""

from pretrain.models import registry as _registry  # noqa: F401
