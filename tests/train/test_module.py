from __future__ import annotations

import torch
from clustered import MakeCache

from llmembed.train import FitConfig
from llmembed.train.fusions.classifier import Classifier
from llmembed.train.gradient.fit import train_by_gradient
from llmembed.train.gradient.module import ClassifierModule, Optimisation
from llmembed.train.inputs.data import FeatureBatches, architecture_of, load_data


def test_lightning_takes_the_steps_of_a_plain_loop(make_cache: MakeCache) -> None:
    """Each batch of a pack is a step: a loop over the batches ends in the same weights."""
    config = FitConfig(
        cache=str(make_cache()),
        fusion="scalar-mix",
        val_fraction=0,
        epochs=3,
        batch_size=4,
        calibrate="none",
    )
    data = load_data(config)
    fitted = train_by_gradient(config, data, [0])[0].classifier
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = Classifier(architecture_of(config, data, "linear"))
    module = ClassifierModule(classifier, Optimisation(lr=1e-3, weight_decay=0.01), 0)
    module.seed_dropout(torch.device("cpu"))
    optimizer = module.configure_optimizers()
    rows, order = torch.from_numpy(data.shares.train), torch.Generator().manual_seed(0)
    for _ in range(3):
        for batch in FeatureBatches(data.x, data.y, rows, 4, order):
            optimizer.zero_grad()
            module.loss_of(batch).backward()
            optimizer.step()
    for own, other in zip(fitted.parameters(), classifier.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=0)
