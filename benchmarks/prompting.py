"""Prompt the same backbone instead of reading its hidden states, and count the answers it gives.

Greedy decoding, either free, where an answer that is not the name of a class counts as wrong and
is told apart (the paper's "hallucination"), or constrained to the names by a prefix tree, where it
cannot happen. Zero-shot, or with examples of the training split in the prompt, one text each of as
many classes as there are shots, in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llmembed.extract import Recipe
from llmembed.extract.quiet import quiet

NO_LABEL = -1
N_FREE_TOKENS = 8


def prompt(
    model: str,
    train: tuple[Sequence[str], npt.NDArray[np.int32]],
    test_texts: Sequence[str],
    names: Sequence[str],
    *,
    n_shots: int,
    constrained: bool,
    max_length: int,
) -> tuple[npt.NDArray[np.int64], int]:
    """Ask the model for the class of each text.

    Args:
        model: alias, Hub id or folder of a causal model.
        train: texts and classes that examples are taken from.
        test_texts: n texts to label.
        names: the C names of the classes.
        n_shots: examples in each prompt.
        constrained: allow only tokens that continue a name.
        max_length: tokens kept of a text.

    Returns:
        int64 `[n]` of classes, -1 where the answer is no name; and 0, no weight being trained.
    """
    import transformers

    recipe = Recipe(model=model, max_length=max_length, compute_dtype="float32", dtype="float16")
    with quiet():
        causal: Any = transformers.AutoModelForCausalLM.from_pretrained(recipe.files.folder)
    causal.eval()
    shots = examples(train, n_shots)
    tokenizer = recipe.tokenizer
    answers = [tokenizer(f" {name}", add_special_tokens=False)["input_ids"] for name in names]
    end = recipe.empty_token if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)
    predicted = []
    for text in test_texts:
        ids = tokenizer(question(_cut(recipe, text), names, shots), return_tensors="pt")
        n_given = ids["input_ids"].shape[1]
        with torch.inference_mode(), quiet():
            generated = causal.generate(
                ids["input_ids"],
                attention_mask=torch.ones_like(ids["input_ids"]),
                max_new_tokens=max(map(len, answers)) + 1 if constrained else N_FREE_TOKENS,
                do_sample=False,
                eos_token_id=end,
                pad_token_id=recipe.pad_token,
                prefix_allowed_tokens_fn=along(answers, n_given, end) if constrained else None,
            )
        predicted.append(answered(tokenizer.decode(generated[0, n_given:]), names))
    return np.array(predicted, dtype=np.int64), 0


def examples(
    train: tuple[Sequence[str], npt.NDArray[np.int32]], n_shots: int
) -> list[tuple[str, int]]:
    """Take the first text of each class in turn, then the second of each, until there are enough.

    >>> examples((["a", "b", "c"], np.array([0, 0, 1])), 3)
    [('a', 0), ('c', 1), ('b', 0)]
    """
    texts, labels = train
    seen: dict[int, int] = {}
    ranked = []
    for row, label in enumerate(labels.tolist()):
        seen[label] = seen.get(label, 0) + 1
        ranked.append((seen[label], label, row))
    return [(texts[row], label) for _, label, row in sorted(ranked)[:n_shots]]


def question(text: str, names: Sequence[str], shots: Sequence[tuple[str, int]]) -> str:
    r"""Write the prompt, which ends where the name of the class belongs.

    >>> question("fine film", ["bad", "good"], [("dull", 0)])
    'Classes: bad, good\n\nText: dull\nClass: bad\n\nText: fine film\nClass:'
    """
    parts = [f"Classes: {', '.join(names)}"]
    parts += [f"Text: {example}\nClass: {names[label]}" for example, label in shots]
    return "\n\n".join([*parts, f"Text: {text}\nClass:"])


def answered(answer: str, names: Sequence[str]) -> int:
    r"""Read the class off an answer: its first line has to begin with a name; -1 if it does not.

    >>> answered(" good\n\nText:", ["bad", "good"]), answered(" I think", ["bad", "good"])
    (1, -1)
    """
    lines = answer.strip().lower().splitlines()
    first = lines[0] if lines else ""
    fitting = [index for index, name in enumerate(names) if first.startswith(name.lower())]
    return max(fitting, key=lambda index: len(names[index])) if fitting else NO_LABEL


def along(
    answers: Sequence[Sequence[int]], n_given: int, end: int
) -> Callable[[int, torch.Tensor], list[int]]:
    """Make the function that allows only tokens on the way to an answer, and the end after one.

    >>> allowed = along([[5, 6], [7]], 1, 0)
    >>> allowed(0, torch.tensor([9])), allowed(0, torch.tensor([9, 5])), allowed(
    ...     0, torch.tensor([9, 7])
    ... )
    ([5, 7], [6], [0])
    """

    def allowed(_batch: int, ids: torch.Tensor) -> list[int]:
        so_far = ids[n_given:].tolist()
        fitting = [answer for answer in answers if list(answer[: len(so_far)]) == so_far]
        follow = {answer[len(so_far)] for answer in fitting if len(answer) > len(so_far)}
        return sorted(follow) or [end]

    return allowed


def _cut(recipe: Recipe, text: str) -> str:
    tokenizer = recipe.tokenizer
    ids = tokenizer(text, truncation=True, max_length=recipe.max_length, add_special_tokens=False)[
        "input_ids"
    ]
    cut: str = tokenizer.decode(ids)
    return cut
