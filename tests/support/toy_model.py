"""Tiny random models on disk, made in a second and the same each time."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCABULARY = {word: index for index, word in enumerate((*SPECIAL, *(f"w{i}" for i in range(91))))}
N_LAYERS = 3
_SIZE: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def save_toy_model(folder: Path, kind: str = "llama", **sizes: int) -> Path:
    """Save a random model (`llama` or `bert`) of 3 layers with a word-level tokenizer.

    Args:
        folder: where.
        kind: its architecture.
        sizes: of the configuration, in place of the usual ones.
    """
    config_class = {"llama": transformers.LlamaConfig, "bert": transformers.BertConfig}[kind]
    # A wide initialisation makes layers and texts differ by far more than rounding.
    config = config_class(**_SIZE | sizes, initializer_range=0.5, bos_token_id=2, eos_token_id=3)
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    toy_tokenizer(special_tokens=kind == "bert").save_pretrained(folder)
    return folder


def toy_tokenizer(*, special_tokens: bool) -> Any:
    backend = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if special_tokens:
        backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(("pad", "unk", "cls", "sep", "mask"), SPECIAL, strict=True))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="[CLS]",
        **{f"{name}_token": token for name, token in names.items()},
    )


def toy_texts(n: int, *, longest: int = 20) -> list[str]:
    """Make n different texts of 1 to `longest` words."""
    generator = torch.Generator().manual_seed(7)
    lengths = torch.randint(1, longest + 1, (n,), generator=generator).tolist()
    return [
        f"w{row % 91} " + " ".join(f"w{i}" for i in torch.randint(91, (k,), generator=generator))
        for row, k in enumerate(lengths)
    ]


def write_texts(path: Path, n: int) -> Path:
    """Write n texts as csv, labelled no and yes in turn."""
    rows = [(text, ("no", "yes")[row % 2]) for row, text in enumerate(toy_texts(n))]
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


def write_two_topics(folder: Path) -> None:
    """Two splits whose label is the first word: `w1` or `w2`."""
    (folder / "topics").mkdir()
    for split, n in (("train", 160), ("test", 60)):
        rows = [
            {"text": f"w{1 + row % 2} " * 6 + text, "label": ("cocoa", "trade")[row % 2]}
            for row, text in enumerate(toy_texts(n, longest=4))
        ]
        lines = "\n".join(map(json.dumps, rows))
        (folder / "topics" / f"{split}.jsonl").write_text(lines, encoding="utf-8")
