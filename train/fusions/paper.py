"""The published recipe to the letter, its defects included: `--preset paper`.

Liu et al., "LLMEmbed: Rethinking Lightweight LLM's Genuine Function in Text Classification" (ACL
2024), as its authors' code has it. Nothing is mended: features enter on their raw scales, in one
Gram matrix, whose power-normalised entries saturate; and the probabilities of the head are given to
a cross-entropy that takes a softmax of its own, so that the loss cannot fall below
`log(1 + (C - 1) / e)`. Sigma and the number of epochs are chosen on the validation share.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmembed.common.errors import ConfigError
from llmembed.train.fusions.cooc import SATURATED, power_normalise
from llmembed.train.fusions.mixing import Fusion
from llmembed.train.fusions.tricks import Dropout
from llmembed.train.inputs.select import Feature

N_LLM_LAYERS = 5
COMPRESSED_WIDTH = 1024
HIDDEN_WIDTHS = (1024, 256)
_POOLINGS = ("mean_padded", "mean")  # of the LLM, the published one first


class PaperCooc(Fusion):
    """Co-occurrence pooling as published: K = n^2 + H.

    The first five features are the LLM's, `phi_i = dropout(relu(W_i x_i + b_i))` of width 1024;
    others (BERT, RoBERTa) have that width and enter as they are. With `Phi [n, 1024]`, `M = Phi
    Phi^T` and `PN(M) = 2 sigmoid(sigma M) - 1`, whose sigma does not learn, the fused vector is
    PN(M), all n^2 entries, beside the mean of the LLM's features.
    """

    sigma: Tensor

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.widths = list(widths)
        llm = self.widths[:N_LLM_LAYERS]
        self.compress = nn.ModuleList(nn.Linear(width, COMPRESSED_WIDTH) for width in llm)
        self.dropout = Dropout(0.5)
        self.register_buffer("sigma", torch.tensor(1.0))
        self.fused_width = len(self.widths) ** 2 + llm[0]
        self.saturated = torch.tensor(0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Fuse, `[B, F]` -> `[B, K]`."""
        parts = torch.split(x, self.widths, dim=1)
        llm = parts[:N_LLM_LAYERS]
        views = [layer(part) for layer, part in zip(self.compress, llm, strict=True)]
        compressed = self.dropout(F.relu(torch.stack(views, dim=1)))
        phi = torch.cat([compressed, *(part[:, None] for part in parts[N_LLM_LAYERS:])], dim=1)
        entries = power_normalise(phi @ phi.transpose(1, 2), self.sigma)  # [B, n, n]
        self.saturated = (entries.detach().abs() > SATURATED).float().mean()
        side_by_side = x[:, : sum(self.widths[:N_LLM_LAYERS])]
        mean = torch.unflatten(side_by_side, 1, (len(llm), -1)).mean(dim=1)  # of no copy
        return torch.cat([entries.flatten(1), mean], dim=1)


class PaperHead(nn.Module):
    """The published MLP, K -> 1024 -> 256 -> C, whose outputs are probabilities."""

    def __init__(self, fused_width: int, n_classes: int, dropout: float) -> None:
        super().__init__()
        first, second = HIDDEN_WIDTHS
        self.layers = nn.Sequential(
            nn.Linear(fused_width, first),
            nn.ReLU(),
            Dropout(dropout),
            nn.Linear(first, second),
            nn.ReLU(),
            Dropout(dropout),
            nn.Linear(second, n_classes),
            nn.Softmax(dim=1),
        )

    def forward(self, fused: Tensor) -> Tensor:
        """Classify, `[B, K]` -> probabilities `[B, C]`, which the loss takes for logits."""
        probabilities: Tensor = self.layers(fused)
        return probabilities


def paper_features(features: Sequence[Feature]) -> tuple[Feature, ...]:
    """Choose five layers of one LLM, then the features that enter raw.

    Raises:
        ConfigError: no source, or several, has five mean-pooled layers, or another source has
            not exactly one feature of width 1024.
    """
    of_source = {
        source: [f for f in features if f.source == source]
        for source in dict.fromkeys(feature.source for feature in features)
    }
    llm = {source: layers for source, own in of_source.items() if (layers := _last_layers(own))}
    if len(llm) != 1:
        counts = {source: _most_of_one_mean(own) for source, own in of_source.items()}
        found = "; ".join(f"{source} has {n}" for source, n in counts.items())
        raise ConfigError(
            f"--preset paper takes the last {N_LLM_LAYERS} mean-pooled layers of one source, and "
            f"of the features chosen {found}. Add layers with llmembed-extract, or choose one "
            "such source with --source and --pooling."
        )
    raw = [f for source, own in of_source.items() if source not in llm for f in own]
    (layers,) = llm.values()
    if len(raw) != len(of_source) - 1 or any(f.hidden_size != COMPRESSED_WIDTH for f in raw):
        raise ConfigError(
            f"--preset paper takes one feature of width {COMPRESSED_WIDTH} of each source beside "
            f"the LLM, and was given {', '.join(f'{f} of width {f.hidden_size}' for f in raw)}. "
            "Choose with --source and --pooling."
        )
    return (*layers, *raw)


def _most_of_one_mean(features: Sequence[Feature]) -> int:
    return max(sum(f.pooling == pooling for f in features) for pooling in _POOLINGS)


def _last_layers(features: Sequence[Feature]) -> tuple[Feature, ...] | None:
    for pooling in _POOLINGS:
        layers = [feature for feature in features if feature.pooling == pooling]
        if len(layers) >= N_LLM_LAYERS:
            return tuple(layers[-N_LLM_LAYERS:])
    return None
