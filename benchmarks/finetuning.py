"""Fine-tune the same backbone instead of freezing it: all of its weights, or LoRA beside them.

LoRA is Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021), by the peft library:
rank 8 on the query and value projections. The rest is what is usual and known to be stable on few
texts (Mosbach et al., "On the Stability of Fine-tuning BERT", 2021): AdamW with bias correction,
clipped gradients, several epochs, a linear warm-up and a linear decay to nothing, so that the last
weights need no early stopping and no training text is held out. The learning rates are the usual
ones; `questions.py --held-out --lr X` tries others on training texts. The arithmetic is that of the
extraction: bfloat16 products over float32 weights where the CPU is fast at them. Batches hold texts
of like length.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llmembed.extract import Recipe
from llmembed.extract.backbones.load import quiet, resolve_compute_dtype

RANK = 8
LEARNING_RATES = {"lora": 1e-3, "full": 5e-5}
TARGETS = {"llama": ["q_proj", "v_proj"], "bert": ["query", "value"]}
WARM_UP = 0.1
LONGEST_GRADIENT = 1.0
SORTED_TOGETHER = 8  # batches whose texts are put in order of length
Texts = Sequence[str]
Rows = npt.NDArray[np.int64]


def fine_tune(
    model: str,
    method: str,
    train: tuple[Texts, npt.NDArray[np.int32]],
    test_texts: Texts,
    n_classes: int,
    *,
    epochs: int,
    max_length: int,
    lr: float | None = None,
    batch_size: int = 16,
) -> tuple[Rows, int]:
    """Train on some texts and label others.

    Args:
        model: alias, Hub id or folder.
        method: lora or full.
        train: texts, and their classes as int32 `[N]`.
        test_texts: n texts to label.
        n_classes: C.
        epochs: passes over the training texts.
        max_length: tokens kept of a text.
        lr: highest learning rate; None is the method's own.
        batch_size: texts in a step.

    Returns:
        int64 `[n]` of classes, and how many weights were trained.
    """
    torch.manual_seed(0)
    recipe = Recipe(model=model, max_length=max_length, compute_dtype="float32", dtype="float16")
    classifier = _classifier(recipe, method, n_classes)
    trained = [weight for weight in classifier.parameters() if weight.requires_grad]
    lr = LEARNING_RATES[method] if lr is None else lr
    optimizer = torch.optim.AdamW(trained, lr=lr, fused=True)
    ids, labels = _ids(recipe, train[0]), torch.from_numpy(train[1].astype(np.int64))
    n_steps = epochs * -(-len(ids) // batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, n_steps))
    generator = np.random.default_rng(0)
    classifier.train()
    for _ in range(epochs):
        for rows in batches(list(map(len, ids)), batch_size, generator):
            optimizer.zero_grad()
            logits = _logits(classifier, recipe, [ids[row] for row in rows])
            torch.nn.functional.cross_entropy(logits, labels[rows]).backward()
            torch.nn.utils.clip_grad_norm_(trained, LONGEST_GRADIENT)
            optimizer.step()
            schedule.step()
    predicted = np.concatenate(list(_predict(classifier, recipe, test_texts, batch_size)))
    return predicted, sum(weight.numel() for weight in trained)


def batches(
    lengths: Sequence[int], batch_size: int, generator: np.random.Generator
) -> Iterator[Rows]:
    """Draw the batches of an epoch: at random, but with texts of like length side by side.

    >>> sorted(len(rows) for rows in batches([5, 9, 2, 7, 1], 2, np.random.default_rng(0)))
    [1, 2, 2]
    """
    order = generator.permutation(len(lengths))
    together = SORTED_TOGETHER * batch_size
    drawn: list[Rows] = []
    for first in range(0, len(order), together):
        part = order[first : first + together]
        part = part[np.argsort(np.asarray(lengths)[part], kind="stable")]
        drawn += [part[start : start + batch_size] for start in range(0, len(part), batch_size)]
    for index in generator.permutation(len(drawn)):
        yield drawn[index]


def _classifier(recipe: Recipe, method: str, n_classes: int) -> Any:
    import transformers

    with quiet():
        model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
            recipe.files.folder,
            num_labels=n_classes,
            pad_token_id=recipe.pad_token,
            dtype=torch.float32,
            attn_implementation="eager",  # a third faster than sdpa here: short texts, a CPU
        )
    if method == "full":
        return model
    import peft

    settings = peft.LoraConfig(
        task_type=peft.TaskType.SEQ_CLS,
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=TARGETS[model.config.model_type],
    )
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5.23 by a name that is going away.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return peft.get_peft_model(model, settings)


def _rate(step: int, n_steps: int) -> float:
    """Rise to 1 over the first tenth of the steps, then fall to 0.

    >>> [_rate(step, 20) for step in (0, 2, 11, 20)]
    [0.0, 1.0, 0.5, 0.0]
    """
    warm_up = max(1, round(WARM_UP * n_steps))
    return min(step / warm_up, (n_steps - step) / max(1, n_steps - warm_up))


def _ids(recipe: Recipe, texts: Texts) -> list[list[int]]:
    ids = recipe.tokenizer(list(texts), truncation=True, max_length=recipe.max_length)["input_ids"]
    return [one or [recipe.empty_token] for one in ids]


def _logits(classifier: Any, recipe: Recipe, ids: Sequence[Sequence[int]]) -> torch.Tensor:
    """Pad on the right and give float32 `[B, C]`."""
    longest = max(map(len, ids))
    padded = torch.full((len(ids), longest), recipe.pad_token)
    mask = torch.zeros_like(padded)
    for row, one in enumerate(ids):
        padded[row, : len(one)] = torch.tensor(one)
        mask[row, : len(one)] = 1
    dtype = resolve_compute_dtype("auto", padded.device)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype == torch.bfloat16):
        logits: torch.Tensor = classifier(input_ids=padded, attention_mask=mask).logits
    return logits.float()


@torch.inference_mode()
def _predict(
    classifier: Any, recipe: Recipe, texts: Texts, batch_size: int
) -> Iterator[npt.NDArray[np.int64]]:
    classifier.eval()
    ids = _ids(recipe, texts)
    for start in range(0, len(ids), batch_size):
        yield _logits(classifier, recipe, ids[start : start + batch_size]).argmax(dim=1).numpy()
