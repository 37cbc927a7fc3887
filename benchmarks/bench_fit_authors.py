"""cooc and the paper's recipe at the paper's size, over its authors' loop, on made-up rows.

Five layers of 4,096 and two more features of 1,024. Theirs is written after their public code
(main.py, MyDataset.py and model_op.py of ChunLiu-cs/LLMEmbed-ACL2024): a data set that gives one
row as four float16 tensors and a label, a DataLoader with four workers and pinned memory where
there is a GPU, which is made anew an epoch, batches of 1,024, Adam, and scikit-learn's figures for
each batch. Each is timed in a process of its own after a warm-up, since ours tells the C library
how to keep memory.

Ours are the fits by gradient of `--preset paper`, which is the same model and the same steps, and
of `--fusion cooc` on the same batches, whose views are narrower: 256 columns, not 1,024. The
classifier that is solved beneath cooc is left out; its logits here are zeros.

Of the paper's recipe little more can be won than what theirs does beside the model's own
arithmetic, so the model alone, on one batch that lies ready, is timed as well. It draws dropout as
torch does; ours draws it more cheaply, and goes beyond it by that alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import statistics
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
import torch.nn.functional as F
from bench_fit_large import paper_problem
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from llmembed.train.config import FitConfig
from llmembed.train.fusions.classifier import Classifier
from llmembed.train.fusions.paper import COMPRESSED_WIDTH, HIDDEN_WIDTHS, N_LLM_LAYERS, PaperCooc
from llmembed.train.gradient.fit import train_by_gradient
from llmembed.train.inputs.data import FitData, architecture_of

N_WORKERS, EPOCHS = 4, 2
_ALONE_STEPS = 3


def measure(n_rows: int, hidden_size: int, repeats: int) -> dict[str, Any]:
    """Give rows per second of ours and theirs, by turns, and of the model alone.

    Args:
        n_rows: made-up training rows.
        hidden_size: width of the five layers.
        repeats: of each.
    """
    size = n_rows, hidden_size
    taken: dict[str, list[float]] = {name: [] for name in _TIMED}
    _check(*_problem(*size))
    for _ in range(repeats):
        for name in _TIMED:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                taken[name].append(pool.submit(_rows_per_s, name, *size).result())
    return {
        "rows_per_s": taken,
        "n_rows": n_rows,
        "hidden_size": hidden_size,
        "load_average": os.getloadavg()[0],
    }


def figures(result: dict[str, Any]) -> dict[str, float]:
    """Give what the bar is about."""
    rate = {name: statistics.median(rates) for name, rates in result["rows_per_s"].items()}
    return {
        "cooc at the paper's size, times its authors' loop": rate["cooc"] / rate["theirs"],
        "paper's preset, times its authors' loop": rate["preset"] / rate["theirs"],
    }


def _rows_per_s(name: str, n_rows: int, hidden_size: int) -> float:
    config, data = _problem(n_rows, hidden_size)
    rates = [_TIMED[name](config, data) for _ in range(2)]  # the first is to warm up
    return rates[-1]


def _problem(n_rows: int, hidden_size: int) -> tuple[FitConfig, FitData]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return paper_problem(device, n_rows, hidden_size, n_raw=2, epochs=EPOCHS)


def _preset(config: FitConfig, data: FitData) -> float:
    return len(data.x) * EPOCHS / train_by_gradient(config, data, [0])[0].fit_s


def _cooc(config: FitConfig, data: FitData) -> float:
    logits = data.x.new_zeros(len(data.x), len(data.labels))
    beside = dataclasses.replace(data, x=torch.cat([data.x, logits], dim=1))
    cooc = dataclasses.replace(config, preset="none", sigma=None, fusion="cooc")
    return _preset(dataclasses.replace(cooc, batch_size=config.training.batch_size), beside)


class _Rows(Dataset[tuple[Tensor, ...]]):
    """Gives the features of one example, in the types in which the authors store them."""

    def __init__(self, data: FitData) -> None:
        llm = N_LLM_LAYERS * data.features[0].hidden_size
        flat, bert, roberta = torch.split(
            data.x.cpu(), [llm, COMPRESSED_WIDTH, COMPRESSED_WIDTH], 1
        )
        self.llm = torch.unflatten(flat, 1, (N_LLM_LAYERS, -1)).half()
        self.bert, self.roberta = bert.contiguous(), roberta.contiguous()
        self.labels = data.y.cpu()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All rows: float16 `[N, 5, H]`, float32 `[N, 1024]` twice, int64 `[N]`."""
        return self.llm, self.bert, self.roberta, self.labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, ...]:
        return self.llm[row], self.bert[row], self.roberta[row], self.labels[row]


class _Model(nn.Module):
    """The published formulas, as plainly as torch allows."""

    def __init__(self, hidden_size: int, n_classes: int, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma
        self.compress = nn.ModuleList(
            nn.Sequential(nn.Linear(hidden_size, COMPRESSED_WIDTH), nn.ReLU(), nn.Dropout(0.5))
            for _ in range(N_LLM_LAYERS)
        )
        widths = [(N_LLM_LAYERS + 2) ** 2 + hidden_size, *HIDDEN_WIDTHS]
        hidden: list[nn.Module] = []
        for width, next_width in itertools.pairwise(widths):
            hidden += [nn.Linear(width, next_width), nn.ReLU(), nn.Dropout(0.5)]
        self.head = nn.Sequential(*hidden, nn.Linear(widths[-1], n_classes), nn.Softmax(dim=1))

    def forward(self, llm: Tensor, bert: Tensor, roberta: Tensor) -> Tensor:
        views = [layer(llm[:, index]) for index, layer in enumerate(self.compress)]
        phi = torch.stack([*views, bert, roberta], dim=1)
        gram = (phi @ phi.transpose(1, 2)).flatten(1)
        entries = 2 * torch.sigmoid(self.sigma * gram) - 1
        probabilities: Tensor = self.head(torch.cat([entries, llm.mean(dim=1)], dim=1))
        return probabilities


def _authors_loop(config: FitConfig, data: FitData) -> float:
    device, rows = data.x.device, _Rows(data)
    model, optimizer = _model(config, rows, device)
    loader = DataLoader(
        rows,
        batch_size=config.training.batch_size,
        shuffle=True,
        num_workers=N_WORKERS,
        pin_memory=device.type == "cuda",
        multiprocessing_context="fork",  # as in a process that was not spawned itself
    )

    def epochs() -> None:
        for _ in range(EPOCHS):
            for batch in loader:
                *features, y = (one.to(device) for one in batch)
                model.train()
                predicted = model(*(one.float() for one in features))
                loss = F.cross_entropy(predicted, y)
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                labels, found = y.cpu(), predicted.argmax(dim=1).cpu()
                accuracy_score(labels, found)
                f1_score(labels, found)
                loss.item()

    return len(rows) * EPOCHS / _seconds(epochs)


def _model_alone(config: FitConfig, data: FitData) -> float:
    """Take steps on one batch that lies ready."""
    device, rows = data.x.device, _Rows(data)
    model, optimizer = _model(config, rows, device)
    first = slice(config.training.batch_size)
    *features, y = (one[first].to(device) for one in rows.tensors)
    features[0] = features[0].float()

    def steps() -> None:
        for _ in range(_ALONE_STEPS):
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(model(*features), y))
            optimizer.step()

    return _ALONE_STEPS * len(y) / _seconds(steps)


def _model(
    config: FitConfig, rows: _Rows, device: torch.device
) -> tuple[_Model, torch.optim.Optimizer]:
    torch.manual_seed(0)
    assert config.sigma is not None
    model = _Model(rows.llm.shape[2], int(rows.labels.max()) + 1, config.sigma).to(device)
    return model, torch.optim.Adam(model.parameters(), lr=config.training.lr)


def _check(config: FitConfig, data: FitData) -> None:
    """Refuse figures of two models that are not the same."""
    rows = _Rows(data)
    theirs, _ = _model(config, rows, torch.device("cpu"))
    ours = Classifier(architecture_of(config, data, config.gradient_head)).eval()
    assert isinstance(ours.fusion, PaperCooc)
    assert config.sigma is not None
    ours.fusion.sigma.fill_(config.sigma)
    for own, other in zip(ours.parameters(), theirs.eval().parameters(), strict=True):
        own.data.copy_(other)
    with torch.no_grad():
        llm, *others = (one[:64].float() for one in rows.tensors[:3])
        expected = theirs(llm, *others)
        found = ours.logits(torch.cat([llm.flatten(1), *others], dim=1))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def _seconds(call: Callable[[], None]) -> float:
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


_TIMED: dict[str, Callable[[FitConfig, FitData], float]] = {
    "preset": _preset,
    "cooc": _cooc,
    "theirs": _authors_loop,
    "the model alone": _model_alone,
}
"""Give rows a second."""
