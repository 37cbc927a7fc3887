"""The paper's recipe at the paper's size, over its authors' loop, on one machine and made-up rows.

Five layers of 4,096 and two more features of 1,024, batches of 1,024, Adam: the same model and the
same steps twice. Ours is `--preset paper` through Lightning. Theirs is written after their public
code (main.py, MyDataset.py and model_op.py of ChunLiu-cs/LLMEmbed-ACL2024): a data set that gives
one row as four float16 tensors and a label, a DataLoader with four workers and pinned memory where
there is a GPU, which is made anew an epoch, and scikit-learn's figures for each batch.

What can be won is what theirs does beside the model's own arithmetic, so the model alone, on one
batch that lies ready, is timed as well: no loop at float32 is faster than that.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from bench_fit_large import paper_problem
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from llmembed.train.classifier import Classifier
from llmembed.train.config import FitConfig
from llmembed.train.data import FitData, architecture_of
from llmembed.train.gradient import train_by_gradient
from llmembed.train.paper import COMPRESSED_WIDTH, HIDDEN_WIDTHS, N_LLM_LAYERS, PaperCooc

N_WORKERS, EPOCHS = 4, 2
_ALONE_STEPS = 3


def measure(n_rows: int, hidden_size: int, repeats: int) -> dict[str, Any]:
    """Give rows per second of ours and theirs, by turns, and of the model alone.

    Args:
        n_rows: made-up training rows.
        hidden_size: width of the five layers.
        repeats: of each.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config, data = paper_problem(device, n_rows, hidden_size, n_raw=2, epochs=EPOCHS)
    rows = _Rows(data)
    taken: dict[str, list[float]] = {"ours": [], "theirs": [], "the model alone": []}
    for _ in range(repeats):
        taken["ours"].append(train_by_gradient(config, data, [0])[0].fit_s)
        taken["theirs"].append(_timed(lambda: _authors_loop(config, rows, device)))
        taken["the model alone"].append(_alone_s(config, rows, device) * n_rows * EPOCHS)
    _check(config, data, rows)
    return {
        "rows_per_s": {
            name: [n_rows * EPOCHS / one for one in seconds] for name, seconds in taken.items()
        },
        "n_rows": n_rows,
        "hidden_size": hidden_size,
        "load_average": os.getloadavg()[0],
    }


def figures(result: dict[str, Any]) -> dict[str, float]:
    """Give what the bar is about."""
    rate = {name: statistics.median(rates) for name, rates in result["rows_per_s"].items()}
    return {"paper's cooc, times its authors' loop": rate["ours"] / rate["theirs"]}


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


def _authors_loop(config: FitConfig, rows: _Rows, device: torch.device) -> None:
    model, optimizer = _model(config, rows, device)
    loader = DataLoader(
        rows,
        batch_size=config.training.batch_size,
        shuffle=True,
        num_workers=N_WORKERS,
        pin_memory=device.type == "cuda",
    )
    for _ in range(config.training.epochs):
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


def _alone_s(config: FitConfig, rows: _Rows, device: torch.device) -> float:
    """Time steps on one batch that lies ready; give seconds a row."""
    model, optimizer = _model(config, rows, device)
    first = slice(config.training.batch_size)
    *features, y = (one[first].to(device) for one in rows.tensors)
    features[0] = features[0].float()

    def steps() -> None:
        for _ in range(_ALONE_STEPS):
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(model(*features), y))
            optimizer.step()

    return _timed(steps) / (_ALONE_STEPS * len(y))


def _model(
    config: FitConfig, rows: _Rows, device: torch.device
) -> tuple[_Model, torch.optim.Optimizer]:
    torch.manual_seed(0)
    assert config.sigma is not None
    model = _Model(rows.llm.shape[2], int(rows.labels.max()) + 1, config.sigma).to(device)
    return model, torch.optim.Adam(model.parameters(), lr=config.training.lr)


def _check(config: FitConfig, data: FitData, rows: _Rows) -> None:
    """Refuse figures of two models that are not the same."""
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


def _timed(call: Callable[[], None]) -> float:
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started
