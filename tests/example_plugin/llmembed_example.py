"""A fusion and a pooling of one's own: pyproject.toml beside this file gives them their names."""

import torch
from torch import Tensor

from llmembed.extract import register_pooling
from llmembed.train import Fusion, register_fusion


@register_pooling("middle")
def middle(hidden: Tensor, n_tokens: Tensor, real: Tensor) -> Tensor:
    """Take the token in the middle, `[B, T, H]` -> float32 `[B, H]`."""
    return hidden[torch.arange(len(hidden)), n_tokens // 2].float()


@register_fusion("range")
class Range(Fusion):
    """How far the features lie apart, element by element: K = H."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.n_features, self.fused_width = len(widths), widths[0]

    def forward(self, x: Tensor) -> Tensor:
        """Fuse, `[B, n * H]` -> `[B, H]`."""
        features = x.unflatten(1, (self.n_features, self.fused_width))
        return features.amax(dim=1) - features.amin(dim=1)
