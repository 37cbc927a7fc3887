from __future__ import annotations

import functools

import torch
from clustered import MakeCache, load

from llmembed.train import FitConfig
from llmembed.train.fusions.classifier import Classifier
from llmembed.train.gradient.fit import train_by_gradient
from llmembed.train.gradient.module import ClassifierModule, epoch_seed
from llmembed.train.inputs.data import FeatureBatches


def test_lightning_takes_the_steps_of_a_plain_loop(make_cache: MakeCache) -> None:
    """A loop over the batches ends in the same weights."""
    config = FitConfig(
        cache=str(make_cache()),
        fusion="scalar-mix",
        val_fraction=0,
        epochs=3,
        batch_size=4,
        calibrate="none",
    )
    data, plan, cpu = load(config), config.plan(), torch.device("cpu")
    fitted = train_by_gradient(plan, data)[0].classifier
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = Classifier(data.architecture("scalar-mix", "linear"))
        module = ClassifierModule(classifier, plan.training, data.class_weights(), 0)
        optimizer = module.configure_optimizers()
        for epoch in range(3):
            seed = functools.partial(epoch_seed, 0, epoch)
            module.seed_dropout(epoch)
            for batch in FeatureBatches(data, data.shares.train, 4, cpu, seed):
                optimizer.zero_grad()
                module.loss_of(batch).backward()
                optimizer.step()
    for own, other in zip(fitted.parameters(), classifier.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=0)
