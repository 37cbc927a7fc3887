"""Models of random weights and texts of random words, as large and as long as the real ones.

Nothing is downloaded: speed depends on shapes and on lengths, not on what weights and words mean.
The tokenizer is SmolLM2's, and each word is one token of it.
The lengths of SST-2 and R8 were counted on their training splits with SmolLM2's tokenizer: 41
quantiles of each. AGNews was not at hand: its lengths are a stand-in, lognormal about its mean of
50 tokens.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from safetensors.torch import save_file

from llmembed.extract.backbones.models import find_model

WEIGHT_STD = 0.02  # LLaMA's own initialisation
SHARD_BLOCKS = 4  # blocks a file: 1.6 GB of LLaMA2-7B
N_TOKENS = 49_152  # of SmolLM2's tokenizer; LLaMA2 has 32,000, which blocks do not see

Floats = npt.NDArray[np.float64]

# fmt: off
SST2_QUANTILES = (
    1, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 6, 6, 6, 7, 7, 8, 8, 9, 9, 10, 11, 11, 12, 13, 14,
    15, 16, 17, 18, 20, 21, 23, 25, 28, 32, 37, 68,
)
R8_QUANTILES = (
    8, 14, 16, 20, 26, 28, 30, 32, 37, 42, 45, 49, 52, 55, 59, 63, 66, 71, 75, 79, 83, 87, 93, 98,
    103, 108, 113, 119, 125, 132, 142, 160, 181, 203, 224, 245, 286, 328, 398, 551, 1150,
)
# fmt: on
AGNEWS_MEAN, AGNEWS_LOG_STD = 50, 0.3


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSet:
    """How long the texts of a data set are, and what the paper's authors padded them to."""

    lengths_at: Callable[[Floats], Floats]
    """Tokens of the texts at these shares (0-1) of all, shortest first."""
    official_width: int
    """Tokens to which the official code pads and cuts every text."""


def _between(quantiles: tuple[int, ...]) -> Callable[[Floats], Floats]:
    steps = np.linspace(0, 1, len(quantiles))
    return lambda shares: np.interp(shares, steps, quantiles)


def _lognormal(mean: float, log_std: float) -> Callable[[Floats], Floats]:
    def lengths_at(shares: Floats) -> Floats:
        normal = torch.special.ndtri(torch.from_numpy(shares)).numpy()
        found: Floats = mean * np.exp(log_std * normal - log_std**2 / 2)
        return found

    return lengths_at


DATA_SETS: Mapping[str, DataSet] = {
    "sst2": DataSet(lengths_at=_between(SST2_QUANTILES), official_width=128),
    "r8": DataSet(lengths_at=_between(R8_QUANTILES), official_width=1024),
    "agnews": DataSet(lengths_at=_lognormal(AGNEWS_MEAN, AGNEWS_LOG_STD), official_width=256),
}


def make_up_texts(
    data_set: DataSet, n_tokens: int, words: Sequence[str], seed: int = 0
) -> list[str]:
    """Draw texts of about `n_tokens` tokens in all, in random order.

    They have the lengths of a data set, the longest cut at its official width.
    """
    generator = np.random.default_rng(seed)
    n_texts = max(8, round(n_tokens / _lengths(data_set, 1000).mean()))
    lengths = generator.permutation(_lengths(data_set, n_texts))
    drawn = generator.integers(0, len(words), lengths.sum())
    ends = np.cumsum(lengths)
    return [
        " ".join(words[word] for word in drawn[end - length : end])
        for length, end in zip(lengths, ends, strict=True)
    ]


def _lengths(data_set: DataSet, n_texts: int) -> npt.NDArray[np.int64]:
    lengths = data_set.lengths_at((np.arange(n_texts) + 0.5) / n_texts)
    return lengths.round().astype(np.int64).clip(1, data_set.official_width)


SIZES = {
    "llama2-7b": (transformers.LlamaConfig, 32, 4096, 32, 32, 11008),
    "bert-large": (transformers.BertConfig, 24, 1024, 16, 16, 4096),
    "minilm": (transformers.BertConfig, 6, 384, 12, 12, 1536),
    "smollm2-135m": (transformers.LlamaConfig, 30, 576, 9, 3, 1536),
}
"""Architecture, layers, hidden size, heads, heads of keys and values, width of the inner layer."""


def model_config(name: str, n_layers: int | None = None, n_channels: int | None = None) -> Any:
    """Configure a model of that shape, or a toy with so many layers, and channels a head."""
    kind, layers, hidden, heads, kv_heads, inner = SIZES[name]
    made: Any = kind(
        num_hidden_layers=n_layers or layers,
        hidden_size=n_channels * heads if n_channels else hidden,
        intermediate_size=n_channels * heads if n_channels else inner,
        num_attention_heads=heads,
        vocab_size=N_TOKENS,
        max_position_embeddings=4096 if kind is transformers.LlamaConfig else 512,
    )
    if kind is transformers.LlamaConfig:
        made.num_key_value_heads = kv_heads
    return made


def find_tokenizer(source: str, folder: Path) -> Any:
    """Load the tokenizer of an alias or a folder, by way of a copy in `folder`."""
    copy = folder / "tokenizer"
    auto: Any = transformers.AutoTokenizer
    if not copy.exists():
        files = find_model(source)
        auto.from_pretrained(files.folder, gguf_file=files.gguf).save_pretrained(copy)
    return auto.from_pretrained(copy)


def words_of(tokenizer: Any) -> list[str]:
    """List the words that are one token, at the beginning of a text and within."""
    words = sorted(word[1:] for word in tokenizer.get_vocab() if re.fullmatch("Ġ[a-z]+", word))
    first, later = (
        tokenizer([before + word for word in words])["input_ids"] for before in ("", " ")
    )
    return [word for word, *ids in zip(words, first, later, strict=True) if all(map(_is_one, ids))]


def _is_one(ids: Sequence[int]) -> bool:
    return len(ids) == 1


def make_up_model(folder: Path, config: Any, tokenizer: Any, device: torch.device) -> Path:
    """Write random bfloat16 weights, drawn on the device, and the tokenizer.

    Args:
        folder: where; a complete model that lies there already is kept.
        config: as `model_config` makes it.
        tokenizer: of transformers.
        device: where the weights are drawn: 6.6 billion of them take a CPU minutes.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    auto: Any = transformers.AutoModel
    with torch.device("meta"):
        empty = auto.from_config(config)
    shapes = {name: tensor.shape for name, tensor in empty.state_dict().items()}
    generator = torch.Generator(device).manual_seed(0)
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, shape in shapes.items():
        block = int(name.split(".")[1]) // SHARD_BLOCKS if name.startswith("layers.") else -1
        shards.setdefault(f"model-{block + 1:05}.safetensors", {})[name] = shape
    for file, members in shards.items():
        tensors = {name: _draw(name, shape, generator).cpu() for name, shape in members.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    config.architectures = [type(empty).__name__]
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    weight_map = {name: file for file, members in shards.items() for name in members}
    size_bytes = sum(2 * shape.numel() for shape in shapes.values())
    document = {"metadata": {"total_size": size_bytes}, "weight_map": weight_map}
    index.write_text(json.dumps(document))
    return folder


def _draw(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:  # a norm's gain, or a bias
        return torch.full(shape, float(not name.endswith("bias")), dtype=torch.bfloat16)
    drawn = torch.empty(shape, dtype=torch.bfloat16, device=generator.device)
    return drawn.normal_(std=WEIGHT_STD, generator=generator)
