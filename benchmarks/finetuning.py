"""Fine-tune the same backbone instead of freezing it: all of its weights, or LoRA beside them.

LoRA is Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021), by the peft library:
rank 8 on the query and value projections. Settings are the usual ones of the literature (AdamW,
linear warm-up and decay), not tuned on these data; texts are sorted into batches at random.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llmembed.extract import Recipe
from llmembed.extract.quiet import quiet

RANK = 8
LEARNING_RATES = {"lora": 1e-3, "full": 5e-5}
TARGETS = {"llama": ["q_proj", "v_proj"], "bert": ["query", "value"]}
WARM_UP = 0.1


def fine_tune(
    model: str,
    method: str,
    train: tuple[Sequence[str], npt.NDArray[np.int32]],
    test_texts: Sequence[str],
    n_classes: int,
    *,
    epochs: int,
    max_length: int,
    batch_size: int = 16,
) -> tuple[npt.NDArray[np.int64], int]:
    """Train on some texts and label others.

    Args:
        model: alias, Hub id or folder.
        method: lora or full.
        train: texts, and their classes as int32 `[N]`.
        test_texts: n texts to label.
        n_classes: C.
        epochs: passes over the training texts.
        max_length: tokens kept of a text.
        batch_size: texts in a step.

    Returns:
        int64 `[n]` of classes, and how many weights were trained.
    """
    torch.manual_seed(0)
    recipe = Recipe(model=model, max_length=max_length, compute_dtype="float32", dtype="float16")
    classifier = _classifier(recipe, method, n_classes)
    trained = [weight for weight in classifier.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATES[method])
    texts, labels = train
    n_steps = epochs * -(-len(texts) // batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, n_steps))
    generator = np.random.default_rng(0)
    classifier.train()
    for _ in range(epochs):
        for rows in np.array_split(generator.permutation(len(texts)), n_steps // epochs):
            inputs = _inputs(recipe, [texts[row] for row in rows])
            optimizer.zero_grad()
            logits = classifier(**inputs).logits
            targets = torch.from_numpy(labels[rows].astype(np.int64))
            torch.nn.functional.cross_entropy(logits, targets).backward()
            optimizer.step()
            schedule.step()
    predicted = np.concatenate(list(_predict(classifier, recipe, test_texts, batch_size)))
    return predicted, sum(weight.numel() for weight in trained)


def _classifier(recipe: Recipe, method: str, n_classes: int) -> Any:
    import transformers

    with quiet():
        model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
            recipe.files.folder, num_labels=n_classes, pad_token_id=recipe.pad_token
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


def _inputs(recipe: Recipe, texts: Sequence[str]) -> dict[str, torch.Tensor]:
    tokenizer = recipe.tokenizer
    ids = tokenizer(list(texts), truncation=True, max_length=recipe.max_length)["input_ids"]
    ids = [one or [recipe.empty_token] for one in ids]
    longest = max(map(len, ids))
    padded = torch.full((len(ids), longest), recipe.pad_token)
    mask = torch.zeros_like(padded)
    for row, one in enumerate(ids):
        padded[row, : len(one)] = torch.tensor(one)
        mask[row, : len(one)] = 1
    return {"input_ids": padded, "attention_mask": mask}


@torch.inference_mode()
def _predict(
    classifier: Any, recipe: Recipe, texts: Sequence[str], batch_size: int
) -> Iterator[npt.NDArray[np.int64]]:
    classifier.eval()
    for start in range(0, len(texts), batch_size):
        inputs = _inputs(recipe, texts[start : start + batch_size])
        yield classifier(**inputs).logits.argmax(dim=1).numpy()
