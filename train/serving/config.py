"""Every option of `llmembed-serve`, and what the rooms below are told of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmembed.common.console import ARGUMENT, COMPLETES, REPEATED
from llmembed.common.errors import ConfigError
from llmembed.train.config.allowed import CONFORMAL_BY, check_conformal_by

_LEAST = {"port": 0}
_SHARES = {
    "abstain": "the share of answers that are to be right",
    "conformal": "the share of sets that are to hold the right label",
}
_MOST = {"port": 65_535}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask for."""

    max_body_bytes: int
    max_texts: int
    max_characters: int


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is computed together, and what may wait."""

    batch_tokens: int
    queue_tokens: int
    queue_requests: int


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Every option of a server; the docstring under a field is its `--help` text."""

    run: str = field(metadata={ARGUMENT: "RUN"})
    """Folder of the run."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 is every address of this machine."""
    port: int = 8000
    """Port to listen at; 0 takes a free one."""
    batch_tokens: int = 4096
    """Tokens of waiting texts that are computed together; more is faster under load, and each
    answer comes later."""
    queue_tokens: int = 65_536
    """Tokens that may wait; then further requests are answered 503."""
    queue_requests: int = 1024
    """Requests that may be there at a time; further ones are answered 503."""
    max_body_bytes: int = 1_048_576
    """Bytes of a request's body."""
    max_texts: int = 256
    """Texts of a request."""
    max_characters: int = 100_000
    """Characters of a text; beyond the tokens that the run's features were made of it is cut."""
    model: tuple[str, ...] = field(default=(), metadata={REPEATED: "[SOURCE=]PLACE"})
    """Where the backbone is now, if it is not where it was; its content must be the same. Of
    several sources, name the one that moved; repeatable."""
    trust_remote_code: bool = False
    """Run the model code that a Hub repository brings."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    abstain: float | None = None
    """Say of each text whether it is left without an answer (`abstained`), so that this share of
    the others is right, such as 0.95; told by rows held out of the training."""
    conformal: float | None = None
    """Give each text the set of labels that holds the right one with this share (`label_set`),
    such as 0.9; told by rows held out of the training."""
    conformal_by: str = field(default="all", metadata={COMPLETES: lambda: CONFORMAL_BY})
    """Keep the share over all texts, or over the texts of each class: all, class."""
    ood: bool = False
    """Give the share of training rows at least as far from the others as each text
    (`out_of_domain`; 0.01 or less: likely of another domain), and note (`note`) which texts are
    empty or were cut."""

    def __post_init__(self) -> None:
        """Refuse numbers that are out of range, and options that contradict each other."""
        check_conformal_by(self.conformal_by, self.conformal)
        for name, meaning in _SHARES.items():
            if (value := getattr(self, name)) is not None:
                from llmembed.train.measures.doubt import check_share  # numpy, which --help spares

                check_share(value, f"--{name}", meaning)
        for name, value in vars(self).items():
            low, high = _LEAST.get(name, 1), _MOST.get(name, 2**31 - 1)
            if type(value) is int and not low <= value <= high:
                raise ConfigError(
                    f"{name} {value} is out of range: it must lie between {low} and {high}. Pass "
                    f"another --{name.replace('_', '-')}."
                )

    @property
    def limits(self) -> Limits:
        """What one request may ask for."""
        return Limits(
            max_body_bytes=self.max_body_bytes,
            max_texts=self.max_texts,
            max_characters=self.max_characters,
        )

    @property
    def sizes(self) -> Sizes:
        """What is computed together, and what may wait."""
        return Sizes(
            batch_tokens=self.batch_tokens,
            queue_tokens=self.queue_tokens,
            queue_requests=self.queue_requests,
        )
