"""RADLADS: turn a pretrained softmax transformer into a linear-attention decoder (arXiv 2505.03005)."""

__version__ = "0.1.0"
