from __future__ import annotations

import pytest
import torch

from llmembed.common.errors import ConfigError
from llmembed.train.fusions import FUSIONS, choices
from llmembed.train.fusions.classifier import make_fusion
from llmembed.train.fusions.cooc import Cooc, CoocCosine, CoocSqrt, power_normalise
from llmembed.train.fusions.mixing import Attention, Concat, Gated, Max, Mean, ScalarMix

X = torch.tensor([[1.0, 2.0, 3.0, 0.0], [0.0, -2.0, 4.0, 2.0]])  # two features of width 2


def test_known_answers() -> None:
    """Mean, max and concat give what arithmetic gives."""
    assert Mean([2, 2])(X).tolist() == [[2.0, 1.0], [2.0, 0.0]]
    assert Max([2, 2])(X).tolist() == [[3.0, 2.0], [4.0, 2.0]]
    assert torch.equal(Concat([1, 3])(X), X)
    assert torch.equal(make_fusion("single", [4])(X), X)


@pytest.mark.parametrize("name", sorted(set(choices(FUSIONS)) - {"single"}))
def test_the_fused_width_is_said_in_advance(name: str) -> None:
    """The fused vector is as wide as `fused_width` says."""
    fusion = make_fusion(name, [2, 2])
    assert fusion(X).shape == (2, fusion.fused_width)


@pytest.mark.parametrize("name", choices(FUSIONS))
def test_a_fusion_learns_as_its_facts_say(name: str) -> None:
    """A fusion that has weights is registered as one that learns."""
    assert bool(list(make_fusion(name, [4]).parameters())) == FUSIONS[name].learns


@pytest.mark.parametrize("fusion", [ScalarMix([2, 2]), Attention([2, 2])])
def test_learned_means_start_as_the_mean(fusion: ScalarMix | Attention) -> None:
    """Before any training scalar-mix and attention weigh all features alike."""
    torch.testing.assert_close(fusion(X), Mean([2, 2])(X))


def test_scalar_mix_equals_its_formula() -> None:
    """The output is gamma times the mean weighted by softmax(s)."""
    fusion = ScalarMix([2, 2])
    fusion.scores.data = torch.tensor([0.0, 1.0]).log_()
    fusion.gamma.data.fill_(3.0)
    torch.testing.assert_close(fusion(X), 3 * X[:, 2:])


def test_attention_equals_its_formula() -> None:
    """Weights are the softmax over the features of tanh(W x_i + b_i) . q."""
    torch.manual_seed(0)
    fusion = Attention([2, 2], key_width=3)
    for weight in fusion.parameters():
        torch.nn.init.normal_(weight)
    scores = [
        torch.tanh(part @ fusion.key.weight.T + fusion.bias[i]) @ fusion.query
        for i, part in enumerate(X.split(2, dim=1))
    ]
    a = torch.stack(scores, dim=1).softmax(dim=1)
    torch.testing.assert_close(fusion(X), a[:, :1] * X[:, :2] + a[:, 1:] * X[:, 2:])


def test_gated_equals_its_formula() -> None:
    """Each view passes a gate that sees all features."""
    torch.manual_seed(0)
    fusion = Gated([1, 3], view_width=5)
    gates = torch.sigmoid(fusion.gates(X)).reshape(2, 2, 5)
    views = [view(part) for view, part in zip(fusion.views, X.split([1, 3], dim=1), strict=True)]
    expected = sum(gates[:, i] * torch.tanh(view) for i, view in enumerate(views))
    torch.testing.assert_close(fusion(X), expected)


def root_of(gram: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(gram)
    return vectors @ torch.diag_embed(values.clamp(min=0).sqrt()) @ vectors.transpose(1, 2)


@pytest.mark.parametrize("kind", [Cooc, CoocCosine, CoocSqrt])
def test_cooc_equals_its_formula(kind: type[Cooc]) -> None:
    """Each group's upper triangle is that of the normalised Gram matrix of unit vectors."""
    torch.manual_seed(0)
    fusion = kind([2, 2])
    fused = fusion(X).reshape(2, 3, fusion.n_groups)
    views = [
        torch.relu(layer(part)).reshape(2, fusion.n_groups, -1)
        for layer, part in zip(fusion.compress, X.split(2, dim=1), strict=True)
    ]
    for group in range(fusion.n_groups):
        unit = torch.nn.functional.normalize(torch.stack([v[:, group] for v in views], 1), dim=2)
        gram = unit @ unit.transpose(1, 2)
        if kind is Cooc:
            gram = torch.tanh(gram * fusion.sigma / 2)
        elif kind is CoocSqrt:
            gram = root_of(gram)
        for entry, (i, j) in enumerate([(0, 0), (0, 1), (1, 1)]):
            torch.testing.assert_close(fused[:, entry, group], gram[:, i, j], atol=2e-2, rtol=0)


def test_gradients_of_cosines_are_those_of_the_plain_formula() -> None:
    """Of four features in three groups, one of them zero, which is like none."""
    generator = torch.Generator().manual_seed(0)
    phi = torch.randn(5, 4, 3, 8, generator=generator)
    phi[0, 1, 2] = 0
    weights = torch.randn(5, 10, 3, generator=generator)
    row, column = torch.triu_indices(4, 4)

    def plain(values: torch.Tensor) -> torch.Tensor:
        unit = torch.nn.functional.normalize(values, dim=3)
        return (unit[:, row] * unit[:, column]).sum(dim=3)

    outcomes = []
    for cosines in (CoocCosine([1] * 4).entries, plain):
        values = phi.clone().requires_grad_()
        entries = cosines(values)
        entries.backward(weights)
        assert values.grad is not None
        values.grad[0, 1, 2] = 0  # normalize's is infinite over a zero vector's length of 1e-12
        outcomes += [(entries.detach(), values.grad)]
    torch.testing.assert_close(*outcomes)


def test_many_features_have_fewer_groups() -> None:
    """With 62 features there are two groups of 1,953 entries; with 100 there is one of 5,050."""
    assert (Cooc([1] * 62).n_groups, Cooc([1] * 62).fused_width) == (2, 3906)
    assert Cooc([1] * 100).n_groups == 1


def test_power_normalisation_is_the_papers() -> None:
    """tanh(sigma M / 2) is 2 sigmoid(sigma M) - 1."""
    gram = torch.linspace(-5, 5, 11)
    torch.testing.assert_close(power_normalise(gram, 0.7), 2 * torch.sigmoid(0.7 * gram) - 1)


def test_cooc_does_not_saturate_on_large_features() -> None:
    """Entries are cosines, so the scale of the features can't saturate them."""
    fusion = Cooc([2, 2])
    fusion(1e4 * X)
    assert fusion.saturated == 0


@pytest.mark.parametrize("name", ["concat", "cooc", "gated"])
def test_sources_of_different_widths(name: str) -> None:
    """Concat and cooc take features of different widths."""
    fusion = make_fusion(name, [1, 3])
    assert fusion(X).shape == (2, fusion.fused_width)


@pytest.mark.parametrize("name", ["mean", "max", "scalar-mix", "attention"])
def test_widths_that_cannot_be_averaged(name: str) -> None:
    """Fusions that average refuse features of different widths."""
    with pytest.raises(ConfigError, match="needs features of one width and was given the widths"):
        make_fusion(name, [1, 3])


def test_single_takes_one_feature() -> None:
    """Single refuses several features and says how to choose one."""
    with pytest.raises(ConfigError, match=r"takes one feature and was given 2.*--layers k"):
        make_fusion("single", [2, 2])
