from __future__ import annotations

import pytest
import torch

from llmembed.cache_format.errors import ConfigError
from llmembed.train.fusion import FUSIONS, Concat, Cooc, Max, Mean, Single, power_normalise

X = torch.tensor([[1.0, 2.0, 3.0, 0.0], [0.0, -2.0, 4.0, 2.0]])  # two features of width 2


def test_known_answers() -> None:
    """Mean, max and concat give what arithmetic gives."""
    assert Mean([2, 2])(X).tolist() == [[2.0, 1.0], [2.0, 0.0]]
    assert Max([2, 2])(X).tolist() == [[3.0, 2.0], [4.0, 2.0]]
    assert torch.equal(Concat([1, 3])(X), X)
    assert torch.equal(Single([4])(X), X)


@pytest.mark.parametrize("name", ["mean", "max", "concat", "cooc"])
def test_the_fused_width_is_said_in_advance(name: str) -> None:
    """The fused vector is as wide as `fused_width` says."""
    fusion = FUSIONS[name]([2, 2])
    assert fusion(X).shape == (2, fusion.fused_width)


def test_cooc_equals_its_formula() -> None:
    """Each group's upper triangle is tanh(sigma cos / 2) of the compressed features."""
    torch.manual_seed(0)
    fusion = Cooc([2, 2], n_groups=3, group_width=5)
    fused = fusion(X)
    views = [
        torch.relu(layer(part)).reshape(2, 3, 5)
        for layer, part in zip(fusion.compress, X.split(2, dim=1), strict=True)
    ]
    for group in range(3):
        for entry, (i, j) in enumerate([(0, 0), (0, 1), (1, 1)]):
            cosine = torch.cosine_similarity(views[i][:, group], views[j][:, group])
            expected = torch.tanh(cosine * fusion.sigma / 2)
            torch.testing.assert_close(fused[:, 3 * entry + group], expected)
    assert torch.equal(fused[:, 9:], X)


def test_power_normalisation_is_the_papers() -> None:
    """tanh(sigma M / 2) is 2 sigmoid(sigma M) - 1."""
    gram = torch.linspace(-5, 5, 11)
    torch.testing.assert_close(power_normalise(gram, 0.7), 2 * torch.sigmoid(0.7 * gram) - 1)


def test_cooc_does_not_saturate_on_large_features() -> None:
    """Entries are cosines, so the scale of the features can't saturate them."""
    fusion = Cooc([2, 2])
    fusion(1e4 * X)
    assert fusion.saturated == 0


@pytest.mark.parametrize("name", ["concat", "cooc"])
def test_sources_of_different_widths(name: str) -> None:
    """Concat and cooc take features of different widths."""
    fusion = FUSIONS[name]([1, 3])
    assert fusion(X).shape == (2, fusion.fused_width)


@pytest.mark.parametrize("name", ["mean", "max"])
def test_widths_that_cannot_be_averaged(name: str) -> None:
    """Mean and max refuse features of different widths."""
    with pytest.raises(ConfigError, match="needs features of one width and was given the widths"):
        FUSIONS[name]([1, 3])


def test_single_takes_one_feature() -> None:
    """Single refuses several features and says how to choose one."""
    with pytest.raises(ConfigError, match=r"takes one feature and was given 2.*--layers k"):
        Single([2, 2])
