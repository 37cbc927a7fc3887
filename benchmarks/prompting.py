"""Prompt the same backbone instead of reading its hidden states, and count the answers it gives.

Greedy decoding, either free, where an answer that names no class, or several, counts as wrong and
is told apart (the paper's "hallucination"), or constrained to the names by a prefix tree, where it
cannot happen. Zero-shot, or with sixteen examples of the training split in the prompt, every class
among them. A model with a chat template is asked by it, since without one an instructed model that
sees no example continues the list of classes instead of answering; the classes of Reuters get names
that say what they are. What all prompts begin with is computed once.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llmembed.extract import Recipe
from llmembed.extract.backbones.load import quiet, resolve_compute_dtype

NO_LABEL = -1
N_FREE_TOKENS = 12
N_SHOTS = 16
PLAIN_NAMES = {  # of the classes of Reuters-21578
    "acq": "acquisitions",
    "crude": "crude oil",
    "earn": "earnings",
    "interest": "interest rates",
    "money-fx": "foreign exchange",
    "ship": "shipping",
}
_SLOT = "{text}"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A causal model that has read what all prompts begin with."""

    causal: Any
    """The model."""
    recipe: Recipe
    """Its tokenizer and how texts are cut."""
    begin: torch.Tensor
    """int64 `[1, T]`, tokens that all prompts begin with."""
    read: Any
    """Keys and values of these tokens."""
    end: str
    """What follows the text in every prompt."""
    answers: Sequence[Sequence[int]]
    """Tokens of each name, as an answer."""


def prompt(
    model: str,
    train: tuple[Sequence[str], npt.NDArray[np.int32]],
    test_texts: Sequence[str],
    names: Sequence[str],
    *,
    few_shot: bool,
    constrained: bool,
    max_length: int,
) -> tuple[npt.NDArray[np.int64], int]:
    """Ask the model for the class of each text.

    Args:
        model: alias, Hub id or folder of a causal model.
        train: texts and classes that examples are taken from.
        test_texts: n texts to label.
        names: the C names of the classes.
        few_shot: show examples in each prompt.
        constrained: allow only tokens that continue a name.
        max_length: tokens kept of a text.

    Returns:
        int64 `[n]` of classes, -1 where the answer is no name; and 0, no weight being trained.
    """
    recipe = Recipe(model=model, max_length=max_length, compute_dtype="float32", dtype="float16")
    shots = examples(train, N_SHOTS) if few_shot else []
    names = [PLAIN_NAMES.get(name, name) for name in names]
    asked = _read_beginning(recipe, names, [(_cut(recipe, text), label) for text, label in shots])
    predicted = [answered(_ask(asked, text, constrained=constrained), names) for text in test_texts]
    return np.array(predicted, dtype=np.int64), 0


def examples(
    train: tuple[Sequence[str], npt.NDArray[np.int32]], n_shots: int
) -> list[tuple[str, int]]:
    """Draw one text of each class, then others as they come, and give them in random order.

    >>> sorted(label for _, label in examples((["a", "b", "c"], np.array([0, 0, 1])), 2))
    [0, 1]
    """
    texts, labels = train
    generator = np.random.default_rng(0)
    order = generator.permutation(len(labels)).tolist()
    firsts = {int(labels[row]): row for row in reversed(order)}.values()
    others = [row for row in order if row not in firsts]
    chosen = [*firsts, *others[: max(0, n_shots - len(firsts))]]
    return [(texts[row], int(labels[row])) for row in generator.permutation(chosen).tolist()]


def question(text: str, names: Sequence[str], shots: Sequence[tuple[str, int]]) -> str:
    r"""Write a prompt for a model without a chat template; it ends where the name belongs.

    >>> question("fine film", ["bad", "good"], [("dull", 0)])
    'Classes: bad, good\n\nText: dull\nClass: bad\n\nText: fine film\nClass:'
    """
    parts = [f"Classes: {', '.join(names)}"]
    parts += [f"Text: {example}\nClass: {names[label]}" for example, label in shots]
    return "\n\n".join([*parts, f"Text: {text}\nClass:"])


def conversation(
    text: str, names: Sequence[str], shots: Sequence[tuple[str, int]]
) -> list[dict[str, str]]:
    r"""Write a prompt as turns of a conversation, the examples with their answers first.

    >>> conversation("fine film", ["bad", "good"], [("dull", 0)])[1]["content"]
    'bad'
    """
    ask = f"Which class does the text belong to? Answer with one of: {', '.join(names)}."
    turns: list[tuple[str, str]] = []
    for example, label in shots:
        turns += [("user", f"{ask}\n\nText: {example}"), ("assistant", names[label])]
    turns.append(("user", f"{ask}\n\nText: {text}"))
    return [{"role": role, "content": content} for role, content in turns]


def answered(answer: str, names: Sequence[str]) -> int:
    r"""Read the class off an answer, whose first line has to name just one; -1 if it does not.

    >>> answered(" The class is good.\n\nText:", ["bad", "good"])
    1
    >>> answered("bad or good", ["bad", "good"]), answered(" goods", ["bad", "good"])
    (-1, -1)
    """
    lines = answer.strip().lower().splitlines()
    first = lines[0] if lines else ""
    named = [
        index
        for index, name in enumerate(names)
        if re.search(rf"(?<!\w){re.escape(name.lower())}(?!\w)", first)
    ]
    return named[0] if len(named) == 1 else NO_LABEL


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


def _read_beginning(
    recipe: Recipe, names: Sequence[str], shots: Sequence[tuple[str, int]]
) -> Asked:
    """Load the model and let it read what all prompts begin with."""
    import transformers

    dtype = resolve_compute_dtype("auto", torch.device("cpu"))
    with quiet():
        causal: Any = transformers.AutoModelForCausalLM.from_pretrained(
            recipe.files.folder, dtype=dtype
        )
    causal.eval()
    tokenizer, lead = recipe.tokenizer, " "
    written = question(_SLOT, names, shots)
    if tokenizer.chat_template:
        turns, lead = conversation(_SLOT, names, shots), ""
        written = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    head, _, end = written.rpartition(f" {_SLOT}")  # a space begins a token, and ends none
    begin = tokenizer(head, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        read = causal(begin, use_cache=True, logits_to_keep=1).past_key_values
    return Asked(
        causal=causal,
        recipe=recipe,
        begin=begin,
        read=read,
        end=end,
        answers=[tokenizer(lead + name, add_special_tokens=False)["input_ids"] for name in names],
    )


def _ask(asked: Asked, text: str, *, constrained: bool) -> str:
    """Give what the model answers about one text."""
    tokenizer = asked.recipe.tokenizer
    written = f" {_cut(asked.recipe, text)}{asked.end}"
    rest = tokenizer(written, return_tensors="pt", add_special_tokens=False)["input_ids"]
    ids = torch.cat([asked.begin, rest], dim=1)
    n_given = ids.shape[1]
    end = asked.recipe.empty_token if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    longest = max(map(len, asked.answers)) + 1
    with torch.inference_mode(), quiet():
        generated = asked.causal.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=copy.deepcopy(asked.read),
            max_new_tokens=longest if constrained else N_FREE_TOKENS,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=asked.recipe.pad_token,
            prefix_allowed_tokens_fn=along(asked.answers, n_given, end) if constrained else None,
        )
    answer: str = tokenizer.decode(generated[0, n_given:], skip_special_tokens=True)
    return answer


def _cut(recipe: Recipe, text: str) -> str:
    tokenizer = recipe.tokenizer
    ids = tokenizer(text, truncation=True, max_length=recipe.max_length, add_special_tokens=False)[
        "input_ids"
    ]
    cut: str = tokenizer.decode(ids)
    return cut
