"""A LLaMA of random weights and texts of random words, as large and as long as the real ones.

Nothing is downloaded: speed depends on shapes and on lengths, not on what weights and words mean.
The lengths of SST-2 and R8 were counted on their training splits with SmolLM2's tokenizer: 41
quantiles of each. AGNews was not at hand: its lengths are a stand-in, lognormal about its mean of
50 tokens.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

WEIGHT_STD = 0.02  # LLaMA's own initialisation
SHARD_BLOCKS = 4  # blocks a file: 1.6 GB of LLaMA2-7B

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


def make_up_texts(data_set: DataSet, n_tokens: int, n_words: int, seed: int = 0) -> list[str]:
    """Draw texts of about `n_tokens` tokens in all, in random order.

    They have the lengths of a data set, the longest cut at its official width, and words out of
    `n_words`.
    """
    generator = np.random.default_rng(seed)
    n_texts = max(8, round(n_tokens / _lengths(data_set, 1000).mean()))
    lengths = generator.permutation(_lengths(data_set, n_texts))
    words = generator.integers(0, n_words, lengths.sum())
    ends = np.cumsum(lengths)
    return [
        " ".join(f"w{word}" for word in words[end - length : end])
        for length, end in zip(lengths, ends, strict=True)
    ]


def _lengths(data_set: DataSet, n_texts: int) -> npt.NDArray[np.int64]:
    lengths = data_set.lengths_at((np.arange(n_texts) + 0.5) / n_texts)
    return lengths.round().astype(np.int64).clip(1, data_set.official_width)


def llama_config(n_layers: int = 32, hidden_size: int = 4096) -> Any:
    """Configure a LLaMA2: the 7B one, or a smaller one of its proportions."""
    whole = hidden_size == 4096
    return transformers.LlamaConfig(
        num_hidden_layers=n_layers,
        hidden_size=hidden_size,
        intermediate_size=11008 if whole else 4 * hidden_size,
        num_attention_heads=hidden_size // min(128, hidden_size // 2),
        vocab_size=32_000 if whole else 1000,
        max_position_embeddings=4096,
    )


def n_words(config: Any) -> int:
    """Count the words that the tokenizer of a made-up model knows: w0, w1, ..."""
    return int(config.vocab_size) - 2


def make_up_llama(folder: Path, config: Any, device: torch.device) -> Path:
    """Write random bfloat16 weights, drawn on the device, and a tokenizer of one token a word.

    Args:
        folder: where; a complete model that lies there already is kept.
        config: as `llama_config` makes it.
        device: where the weights are drawn: 6.6 billion of them take a CPU minutes.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        shapes = {
            name: tensor.shape
            for name, tensor in transformers.LlamaModel(config).state_dict().items()
        }
    generator = torch.Generator(device).manual_seed(0)
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, shape in shapes.items():
        block = int(name.split(".")[1]) // SHARD_BLOCKS if name.startswith("layers.") else -1
        shards.setdefault(f"model-{block + 1:05}.safetensors", {})[name] = shape
    for file, members in shards.items():
        tensors = {name: _draw(shape, generator).cpu() for name, shape in members.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    _tokenizer(config).save_pretrained(folder)
    config.architectures = ["LlamaModel"]
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    weight_map = {name: file for file, members in shards.items() for name in members}
    size_bytes = sum(2 * shape.numel() for shape in shapes.values())
    document = {"metadata": {"total_size": size_bytes}, "weight_map": weight_map}
    index.write_text(json.dumps(document))
    return folder


def _draw(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:  # a norm's gain
        return torch.ones(shape, dtype=torch.bfloat16)
    drawn = torch.empty(shape, dtype=torch.bfloat16, device=generator.device)
    return drawn.normal_(std=WEIGHT_STD, generator=generator)


def _tokenizer(config: Any) -> Any:
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    words = [*special.values(), *(f"w{index}" for index in range(n_words(config)))]
    vocabulary = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=special["unk_token"]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast: Any = transformers.PreTrainedTokenizerFast
    longest = config.max_position_embeddings
    return fast(tokenizer_object=backend, model_max_length=longest, **special)
