"""Targets: what is typed: layers, templates, prompts, names, and how labels are parted."""

from __future__ import annotations

import random
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pyarrow as pa
from fuzzing import TEXTS, Targets, Try

from llmembed.cache_format.layout.schema import check_name
from llmembed.common.layers import check_layers, named_layers, parse_layers
from llmembed.common.splits import split_name
from llmembed.extract import ExtractConfig
from llmembed.extract.texts import DatasetOptions
from llmembed.extract.texts.corpora import load_corpus
from llmembed.extract.texts.label_sets import encode_lists, from_texts
from llmembed.extract.texts.options import Dialect
from llmembed.extract.texts.prompts import check_prompts, name_of, pooling_of, resolve_prompts
from llmembed.extract.texts.templates import fill, is_unicode, template_fields

LAYERS = ("all", "last:", "last", ":", "::", ",", "-", "+", " ", "_", "0", "1", "8", "30", "9" * 30)
BRACES = ("{", "}", "{{", "}}", "{text}", "{text_a}", "{text_b}", "!r", ":>9", ".a", "[0]", "{0}")
PROMPTS = ("eol", "auto", "In one word:", "The topic is", "-", "_", "It was")
LABELS = (";", "; ", "|", "a", "b", "a;b", ";;", "\x1f", "none", '"', ",", "\u00a0", "\udcff")
_CLASSES = (("sports", "world"), (), ("0", "1"), ("", "a"), ("{text}", "\n"), ("x",) * 30)


def drawn(rng: random.Random, words: tuple[str, ...]) -> str:
    """Join words of a grammar and of what is hostile anywhere."""
    n = rng.choice((0, 1, 1, 2, 2, 3, 5, 9))
    return "".join(
        rng.choice(words if rng.random() < 0.8 else TEXTS)
        if rng.random() < 0.95
        else chr(rng.choice((rng.randrange(128), rng.randrange(0x110000))))
        for _ in range(n)
    )


def layers(_: ExitStack) -> Try:
    """The grammar of --layers, by each of its three doors, which agree on what can be read."""

    def one(rng: random.Random) -> bool:
        text, n_layers = drawn(rng, LAYERS), rng.choice((0, 1, 30))
        known = sorted(rng.sample(range(n_layers + 1), rng.randrange(n_layers + 1)))
        try:
            check_layers(text)
        finally:
            named_layers(text, n_layers, known)
        found = parse_layers(text, n_layers, "toy")
        assert list(found) == sorted(set(found))
        assert set(found) <= set(range(n_layers + 1))
        return True

    return one


def templates(_: ExitStack) -> Try:
    """A template that is taken holds each text whole."""

    def one(rng: random.Random) -> bool:
        template, text = drawn(rng, BRACES), drawn(rng, BRACES)
        fields = template_fields(template)
        pair = len(fields) == 2
        assert is_unicode(template)
        ((filled,),) = fill(template, [f"{text}\x1fx" if pair else text], text_pair=pair)
        assert pair or text in filled
        return True

    return one


def prompts(_: ExitStack) -> Try:
    """A prompt that is taken has a name that may be a pooling of a cache."""

    def one(rng: random.Random) -> bool:
        given = [drawn(rng, PROMPTS) for _ in range(rng.choice((1, 1, 2)))]
        check_prompts(given)
        found = resolve_prompts(given, rng.choice(_CLASSES))
        for name, prompt in found.items():
            assert name == name_of(prompt)
            assert prompt[0].isspace()
            check_name("pooling", pooling_of(name))
        return True

    return one


def labels(stack: ExitStack) -> Try:
    """Labels parted at any separator, or read from a file in any dialect."""
    place = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "toy.csv"

    def one(rng: random.Random) -> bool:
        separator = drawn(rng, LABELS)
        texts = [one for one in (drawn(rng, LABELS) for _ in range(4)) if is_unicode(one)]
        ExtractConfig(model="m", dataset="d", layers="1", label_separator=separator)
        mark = rng.choice((None, "", drawn(rng, LABELS)))
        if rng.random() < 0.7:
            column = pa.chunked_array([pa.array(texts, pa.string())])
            listed = from_texts("toy", "tags", column, separator=separator)
            found = encode_lists({"train": listed}, unlabelled=mark)
            assert found.sets is not None
            return len(found.sets["train"]) == len(texts)
        names = [rng.choice((None, drawn(rng, LABELS), "one")) for _ in range(3)]
        dialect = Dialect(delimiter=names[0], csv_quote=names[1], csv_escape=names[2])
        lines = [f"text,label,{drawn(rng, LABELS)}", *(f"{n},{one}" for n, one in enumerate(texts))]
        place.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
        options = DatasetOptions(
            str(place),
            label_separator=rng.choice((None, separator)),
            label_column=rng.choice((None, "label", drawn(rng, LABELS))),
            text_column=rng.choice((None, "text", drawn(rng, LABELS))),
            splits=rng.choice(((), ("train",), (drawn(rng, LABELS),))),
            unlabelled=mark,
            dialect=dialect,
        )
        return bool(load_corpus(options).splits)

    return one


def names(_: ExitStack) -> Try:
    """Names of splits, sources and poolings."""

    def one(rng: random.Random) -> bool:
        name = drawn(rng, ("train", "..", ".", "/", "-", "a", "Label", "c", "\\", "CON"))
        assert isinstance(split_name(name), str)
        check_name("split", name)
        place = Path("/root").joinpath(name)
        assert place.parent == Path("/root")
        assert place.name == name
        return True

    return one


TARGETS: Targets = {
    "layers": layers,
    "templates": templates,
    "prompts": prompts,
    "labels": labels,
    "names": names,
}
