"""What a step by gradient costs: our fit over bare loops of torch on the same rows.

`gradient`: the scalar mix of four layers, over as many epochs as a fit on real features takes until
it stops early, through the trainer and in a loop with nothing around it. Steps are tiny, a
millisecond each, so this shows what is not the model's.

`authors`: the paper's recipe at its size, five layers of 4,096 and two more features of 1,024, on
made-up rows, over its authors' loop. Theirs is written after their public code (main.py,
MyDataset.py and model_op.py of ChunLiu-cs/LLMEmbed-ACL2024): a data set that gives one row as four
float16 tensors and a label, a DataLoader with four workers and pinned memory where there is a GPU,
which is made anew an epoch, batches of 1,024, Adam, and scikit-learn's figures for each batch. Each
is timed in a process of its own after a warm-up, since ours tells the C library how to keep memory.
Both have as many weights, which is checked; ours also draws dropout more cheaply than torch.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import statistics
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from llmembed.cache_format import open_cache
from llmembed.train import FitConfig
from llmembed.train.inputs.data import FitData, load_data
from llmembed.train.verbs.fitting import train

EPOCHS, AUTHORS_EPOCHS, N_WORKERS = 20, 2, 4
RAW_WIDTH, HIDDEN_WIDTHS, SIGMA = 1024, (1024, 256), 0.1  # of the paper
Measured = tuple[dict[str, Any], dict[str, float]]


def measure(config: FitConfig, repeats: int) -> Measured:
    """Time the fit and the bare loop by turns; the ratio is the median over the rounds.

    Args:
        config: cache, source, pooling and layers.
        repeats: of each.
    """
    config = dataclasses.replace(config, fusion="scalar-mix", accelerator="cpu", calibrate="none")
    config = dataclasses.replace(config, epochs=EPOCHS, patience=EPOCHS)
    plan = config.plan()
    data = load_data(plan.reading)
    classifier = train(plan, data).best.classifier
    ways = {
        "fit_s": lambda: train(plan, data).best.fit_s,
        "bare_loop_s": lambda: _bare_loop(copy.deepcopy(classifier), config, data),
    }
    n_steps = EPOCHS * -(-len(data.shares.train) // config.training.batch_size)
    found = harness.by_turns(ways, repeats, warm_up=True)
    figures = {
        "fit by gradient over a bare loop": harness.ratio(found["fit_s"], found["bare_loop_s"]),
        "fit by gradient, ms a step": 1000 * statistics.median(found["fit_s"]) / n_steps,
    }
    return {**found, "n_steps": n_steps}, figures


def _bare_loop(classifier: Any, config: FitConfig, data: FitData) -> None:
    """Take as many steps on the same model, and validate once an epoch, on one thread."""
    n_threads, training = torch.get_num_threads(), config.training
    torch.set_num_threads(1)
    for weight in classifier.parameters():
        weight.requires_grad_()
    options: dict[str, Any] = {"lr": training.lr, "weight_decay": training.weight_decay}
    optimizer = torch.optim.AdamW(classifier.parameters(), fused=True, **options)
    rows, held_out = (torch.from_numpy(one) for one in (data.shares.train, data.shares.validation))
    for _ in range(training.epochs):
        classifier.train()
        for batch in torch.split(rows[torch.randperm(len(rows))], training.batch_size):
            optimizer.zero_grad()
            loss = F.cross_entropy(classifier.logits(data.x[batch]), data.y[batch])
            torch.autograd.backward(loss)
            optimizer.step()
        classifier.eval()
        with torch.no_grad():
            F.cross_entropy(classifier.logits(data.x[held_out]), data.y[held_out]).item()
    torch.set_num_threads(n_threads)


def measure_authors(path: Path, repeats: int) -> Measured:
    """Give rows per second of ours and theirs, by turns.

    Args:
        path: of a cache with the sources llm (five layers), bert and roberta.
        repeats: of each.
    """
    taken: dict[str, list[float]] = {"preset": [], "theirs": []}
    n_weights = set()
    for _ in range(repeats):
        for name, rates in taken.items():
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                rate, n_parameters = pool.submit(_rows_per_s, name, str(path)).result()
            rates.append(rate)
            n_weights.add(n_parameters)
    if len(n_weights) > 1:
        raise AssertionError(f"these are two models, of {n_weights} weights")
    times = statistics.median(taken["preset"]) / statistics.median(taken["theirs"])
    return {"rows_per_s": taken}, {"paper's preset, times its authors' loop": times}


def _rows_per_s(name: str, path: str) -> tuple[float, int]:
    """Train twice, the first time to warm up; rows a second, and the number of weights."""
    way = {"preset": _preset, "theirs": _authors_loop}[name]
    way(path)
    return way(path)


def _preset(path: str) -> tuple[float, int]:
    kind = "gpu" if torch.cuda.is_available() else "cpu"
    options: dict[str, Any] = {"epochs": AUTHORS_EPOCHS, "calibrate": "none", "accelerator": kind}
    config = FitConfig(cache=path, preset="paper", sigma=SIGMA, val_fraction=0, **options)
    plan = config.plan()
    data = load_data(plan.reading)
    trained = train(plan, data).best
    n_weights = sum(weight.numel() for weight in trained.classifier.parameters())
    return len(data.x) * AUTHORS_EPOCHS / trained.fit_s, n_weights


class AuthorsModel(nn.Module):
    """The published formulas, as plainly as torch allows."""

    def __init__(self, n_layers: int, hidden_size: int, n_classes: int) -> None:
        super().__init__()
        self.compress = nn.ModuleList(
            nn.Sequential(nn.Linear(hidden_size, RAW_WIDTH), nn.ReLU(), nn.Dropout(0.5))
            for _ in range(n_layers)
        )
        widths = [(n_layers + 2) ** 2 + hidden_size, *HIDDEN_WIDTHS]
        hidden: list[nn.Module] = []
        for width, next_width in itertools.pairwise(widths):
            hidden += [nn.Linear(width, next_width), nn.ReLU(), nn.Dropout(0.5)]
        self.head = nn.Sequential(*hidden, nn.Linear(widths[-1], n_classes), nn.Softmax(dim=1))

    def forward(self, llm: Tensor, bert: Tensor, roberta: Tensor) -> Tensor:
        """Give the probabilities, `[B, C]`."""
        views = [layer(llm[:, index]) for index, layer in enumerate(self.compress)]
        phi = torch.stack([*views, bert, roberta], dim=1)
        gram = (phi @ phi.transpose(1, 2)).flatten(1)
        entries = 2 * torch.sigmoid(SIGMA * gram) - 1
        probabilities: Tensor = self.head(torch.cat([entries, llm.mean(dim=1)], dim=1))
        return probabilities


def _authors_loop(path: str) -> tuple[float, int]:
    split, device = open_cache(path)["train"], "cuda" if torch.cuda.is_available() else "cpu"
    stacked = np.stack([split.features(layer, "llm") for layer in split.layers("llm")], axis=1)
    others = [split.features(0, source).astype(np.float32) for source in ("bert", "roberta")]
    features = [torch.from_numpy(one) for one in (stacked, *others)]
    labels = torch.from_numpy(split.labels.astype(np.int64))
    torch.manual_seed(0)
    n_layers, hidden_size = stacked.shape[1:]
    model = AuthorsModel(n_layers, hidden_size, int(labels.max()) + 1).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores
    loader = DataLoader(
        TensorDataset(*features, labels),
        batch_size=1024,
        shuffle=True,
        num_workers=N_WORKERS,
        pin_memory=device == "cuda",
        multiprocessing_context="fork",  # as in a process that was not spawned itself
    )

    def epochs() -> None:
        model.train()
        for _ in range(AUTHORS_EPOCHS):
            for batch in loader:
                *inputs, y = (one.to(device) for one in batch)
                predicted = model(*(one.float() for one in inputs))
                loss = F.cross_entropy(predicted, y)
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                expected, found = y.cpu(), predicted.argmax(dim=1).cpu()
                accuracy_score(expected, found)
                f1_score(expected, found)
                loss.item()

    seconds, _ = harness.timed(epochs)
    n_weights = sum(weight.numel() for weight in model.parameters())
    return len(labels) * AUTHORS_EPOCHS / seconds, n_weights
