"""What an extraction costs that nobody has run: units, objects, memory, requests, time, stragglers.

What the software costs is measured: the results of `ranks` (planning, loading), `ray` (the driver)
and `scaling` (records, closing, requests of a block). What machines and stores do is assumed, and
each assumption is an option below. Blocks of unequal texts on unequal GPUs, some of which fail, are
then handed out as the engine does it, one event after another.

    python benchmarks simulate [--n-texts 1000000000] [--gpus 1 8 64 512] [--tokens-per-s 30000]

Prints the tables of docs/scaling.md.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
import random
from collections.abc import Sequence
from pathlib import Path

import harness

from llmembed.cache_format.layout.schema import MAX_BLOCK_ROWS, block_rows
from llmembed.extract.engines.ray_engine import blocks_a_unit

MEASURED = harness.RESULTS / "speed"
HOUR_S = 3600.0
SPOOLED_BYTES_A_ROW = 12
"""Label and hash of a text, in a mapped file."""
HASH_BYTES_PER_S = 2.8e10
"""xxh3-128 on one core, see `cache_format/layout/arrays.py`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assumed:
    """What no benchmark of this project can measure on two cores."""

    n_texts: int = 1_000_000_000
    n_layers: int = 4
    hidden_size: int = 4096
    tokens_a_text: float = 64.0
    token_spread: float = 0.7
    """Standard deviation of the tokens of a text, as a share of their mean."""
    tokens_per_s: float = 30_000.0
    """Of one GPU: 7 billion parameters in bfloat16 at 40 % of the peak of an H100."""
    noise: float = 0.05
    """Standard deviation of a unit's time that its texts do not explain, as a share."""
    slow_share: float = 0.02
    """Share of the GPUs that are slow."""
    slow_speed: float = 0.5
    """Speed of a slow GPU."""
    hours_between_failures: float = 100.0
    """Of one GPU; its unit is lost and done again by another."""
    minutes_to_replace: float = 10.0
    """Until a failed GPU has a successor."""
    model_bytes: float = 13.5e9
    """Read by every worker when it starts."""
    read_bytes_per_s: float = 1e9
    """Of the model, by one worker."""
    gpus_a_machine: int = 8
    """GPUs that share a network card."""
    network_bytes_per_s: float = 25e9 / 8
    """Of that card, to and from the store."""
    request_s: float = 0.03
    """Answer time of the store to a small request."""
    requests_at_once: int = 16
    """Requests in flight of the process that closes the cache."""
    usd_per_1000_puts: float = 0.005
    """S3 Standard, as the next two; listings cost the same."""
    usd_per_1000_gets: float = 0.0004
    usd_per_gb_month: float = 0.023

    @property
    def rows_a_block(self) -> int:
        """R, as the format prescribes it."""
        return block_rows(self.n_texts, self.hidden_size * 2)

    @property
    def n_blocks(self) -> int:
        """Blocks of the one split."""
        return math.ceil(self.n_texts / self.rows_a_block)

    @property
    def block_bytes(self) -> int:
        """Features of a block, float16."""
        return self.rows_a_block * self.hidden_size * 2 * self.n_layers

    @property
    def feature_bytes(self) -> int:
        """Features of all texts."""
        return self.n_texts * self.hidden_size * 2 * self.n_layers

    @property
    def block_s(self) -> float:
        """Time of a block on a GPU that is not slow."""
        return self.rows_a_block * self.tokens_a_text / self.tokens_per_s


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """What one block, unit or row costs, from the results of the benchmarks."""

    driver_bytes: float
    """Of a process that planned a million texts."""
    bytes_a_row: float
    """What each further text adds to it."""
    plan_s_a_row: float
    """Planning: what `load_s_a_row` is, and hashing the text."""
    load_s_a_row: float
    """What every worker does with the data set before its first unit."""
    driver_cpu_s_a_unit: float
    """Of the driver, while units are handed out."""
    driver_bytes_a_unit: float
    """Of the driver, for Ray's account of a unit."""
    engine_s_a_unit: float
    """Time of a worker that is no work."""
    start_s: float
    """Ray, and its first worker, without model and data set."""
    plan_bytes_a_block: float
    """Python objects of a planned block; the next one's while the cache is closed."""
    close_bytes_a_block: float
    close_cpu_s_a_block: float
    """Of closing, beside hashing."""
    metadata_bytes_a_block: float
    """Records and indexes."""
    n_layers: int
    """Of the blocks whose requests follow: of a worker, and of closing, for each block."""
    work_puts: float
    work_gets: float
    close_gets: float

    @classmethod
    def read(cls, folder: Path) -> Measured:
        """Take the slopes between the two largest sizes that were measured."""
        ranks, ray, scaling = (
            harness.read(folder / f"{name}.json") for name in ("ranks", "ray", "scaling")
        )
        small, large = ranks["planned"][-2:]
        few, many = scaling["measured"][-2:]
        requests = scaling["requests"]
        paced, fast, each = ray["paced"], ray["many"], requests["per_block"]

        def a_row(key: str) -> float:
            slope: float = (large[key] - small[key]) / (large["n_rows"] - small["n_rows"])
            return max(0.0, slope)

        def a_block(key: str) -> float:
            slope: float = (many[key] - few[key]) / (many["n_rows"] - few["n_rows"])
            return slope * MAX_BLOCK_ROWS

        return cls(
            driver_bytes=small["peak_bytes"],
            bytes_a_row=a_row("peak_bytes"),
            plan_s_a_row=a_row("seconds"),
            load_s_a_row=a_row("load_s"),
            driver_cpu_s_a_unit=fast["driver_cpu_s"] / fast["n_units"],
            driver_bytes_a_unit=fast["driver_bytes_a_unit"],
            engine_s_a_unit=max(0.0, ray["engine_s_a_unit"]),
            start_s=ray["ray_start_s"] + paced["until_first_receipt_s"] - paced["unit_s"],
            plan_bytes_a_block=a_block("plan_bytes"),
            close_bytes_a_block=a_block("finalize_bytes"),
            close_cpu_s_a_block=a_block("finalize_s"),
            metadata_bytes_a_block=a_block("metadata_bytes"),
            n_layers=requests["n_layers"],
            work_puts=each["work"]["PUT"],
            work_gets=each["work"]["GET"],
            close_gets=each["finalize"]["GET"],
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate each number of GPUs, print the tables and one JSON line."""
    parser = harness.command_line(__doc__, "studies/simulate.json")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64, 512])
    for field in dataclasses.fields(Assumed):
        name, kind = f"--{field.name.replace('_', '-')}", type(field.default)
        parser.add_argument(name, type=kind, default=field.default)
    parser.add_argument("--results", type=Path, default=MEASURED, help="folder of the benchmarks'")
    options = vars(parser.parse_args(arguments))
    gpus, results, output = (options.pop(name) for name in ("gpus", "results", "output"))
    assumed, measured = Assumed(**options), Measured.read(results)
    once = whole(assumed, measured)
    runs = [run(assumed, measured, n_gpus) for n_gpus in gpus]
    print("\n".join([*table_of_whole(once), "", *table_of_runs(runs)]))
    harness.finish({"assumed": dataclasses.asdict(assumed), "once": once, "runs": runs}, output)


def whole(assumed: Assumed, measured: Measured) -> dict[str, float]:
    """Tell what does not depend on the number of GPUs."""
    n_texts, n_blocks = assumed.n_texts, assumed.n_blocks
    more_layers = assumed.n_layers - measured.n_layers  # each is a chunk, put once and hashed once
    n_puts = n_blocks * (measured.work_puts + more_layers)
    n_gets = n_blocks * (measured.work_gets + measured.close_gets + more_layers)
    n_small = n_blocks * (measured.close_gets - measured.n_layers - 1)  # records, not chunks
    usd = n_puts * assumed.usd_per_1000_puts + n_gets * assumed.usd_per_1000_gets
    return {
        "feature_bytes": assumed.feature_bytes,
        "n_blocks": n_blocks,
        "n_objects": n_blocks * (assumed.n_layers + 2),
        "metadata_bytes": n_blocks * measured.metadata_bytes_a_block,
        "plan_s": n_texts * measured.plan_s_a_row,
        "load_s": n_texts * measured.load_s_a_row,
        "spooled_bytes": n_texts * SPOOLED_BYTES_A_ROW,
        "close_read_s": assumed.feature_bytes / assumed.network_bytes_per_s,
        "close_records_s": n_small * assumed.request_s / assumed.requests_at_once,
        "close_cpu_s": n_blocks * measured.close_cpu_s_a_block
        + assumed.feature_bytes / HASH_BYTES_PER_S,
        "close_memory_bytes": measured.driver_bytes + n_blocks * measured.close_bytes_a_block,
        "n_puts": n_puts,
        "n_gets": n_gets,
        "requests_usd": usd / 1000,
        "storage_usd_a_month": assumed.feature_bytes / 1e9 * assumed.usd_per_gb_month,
    }


def run(assumed: Assumed, measured: Measured, n_gpus: int) -> dict[str, float]:
    """Play an extraction on so many GPUs, one a worker, which takes the next unit when it is free.

    A unit whose GPU fails is done again in the next round.
    """
    choice = random.Random(n_gpus)  # noqa: S311 - a seed, so that the tables stay
    n_each, n_blocks = blocks_a_unit(assumed.n_blocks, n_gpus), assumed.n_blocks
    start_s = measured.start_s + assumed.model_bytes / assumed.read_bytes_per_s
    start_s += assumed.n_texts * measured.load_s_a_row
    pending = [min(n_each, n_blocks - first) for first in range(0, n_blocks, n_each)]
    is_slow = [choice.random() < assumed.slow_share for _ in range(n_gpus)]
    n_units, n_rounds, n_lost, now, waited_s = len(pending), 0, 0, 0.0, 0.0
    while pending:
        workers = [(now + start_s, worker) for worker in range(n_gpus)]
        lost, ends = [], [now] * n_gpus
        for unit in pending:
            free, worker = heapq.heappop(workers)
            block_s = _block_s(assumed, choice, unit, n_gpus, is_slow=is_slow[worker])
            end = free + (unit * block_s + measured.engine_s_a_unit)
            fails = free + choice.expovariate(1 / (assumed.hours_between_failures * HOUR_S))
            if fails < end:
                lost.append(unit)
                end = fails + assumed.minutes_to_replace * 60 + start_s
            else:
                ends[worker] = end
            heapq.heappush(workers, (end, worker))
        now = max(ends)
        waited_s += sum(now - end for end in ends)  # of all workers, for the last unit
        n_rounds, n_lost, pending = n_rounds + 1, n_lost + len(lost), lost
    n_machines = math.ceil(n_gpus / assumed.gpus_a_machine)
    return {
        "n_gpus": n_gpus,
        "blocks_a_unit": n_each,
        "n_units": n_units,
        "unit_s": assumed.block_s * n_each,
        "start_s": start_s,
        "n_lost": n_lost,
        "n_rounds": n_rounds,
        "wall_s": now,
        "ideal_s": assumed.n_texts * assumed.tokens_a_text / assumed.tokens_per_s / n_gpus,
        "waited_s": waited_s / n_gpus,
        "close_read_s": assumed.feature_bytes / assumed.network_bytes_per_s / n_machines,
        "driver_cpu_share": n_units * measured.driver_cpu_s_a_unit / now,
        "driver_bytes": measured.driver_bytes
        + assumed.n_texts * measured.bytes_a_row
        + n_blocks * measured.plan_bytes_a_block
        + n_units * measured.driver_bytes_a_unit,
    }


def _block_s(
    assumed: Assumed, choice: random.Random, n_blocks: int, n_gpus: int, *, is_slow: bool
) -> float:
    """Draw what a block of a unit takes: its tokens, and what they do not explain."""
    n_texts = n_blocks * assumed.rows_a_block
    spread = math.hypot(assumed.token_spread / math.sqrt(n_texts), assumed.noise)
    work_s = assumed.block_s * max(0.1, choice.gauss(1.0, spread))
    if is_slow:
        work_s /= assumed.slow_speed
    sharing = min(n_gpus, assumed.gpus_a_machine)
    return max(work_s, assumed.block_bytes / (assumed.network_bytes_per_s / sharing))


def table_of_whole(once: dict[str, float]) -> list[str]:
    """Tell in Markdown what does not depend on the number of GPUs."""
    rows = (
        ("features", f"{once['feature_bytes'] / 1e12:.1f} TB"),
        ("blocks, each with one record", f"{once['n_blocks']:,.0f}"),
        ("objects: chunks and records", f"{once['n_objects'] / 1e6:.2f} million"),
        ("metadata: records, indexes", f"{once['metadata_bytes'] / 1e9:.2f} GB"),
        ("planning, on one core", hours(once["plan_s"])),
        ("labels and hashes in `TMPDIR`", f"{once['spooled_bytes'] / 1e9:.0f} GB"),
        ("reading the data set, each worker, from Parquet", hours(once["load_s"])),
        ("closing: reading all chunks, one machine", hours(once["close_read_s"])),
        ("closing: reading records", hours(once["close_records_s"])),
        ("closing: hashing and the rest, one core", hours(once["close_cpu_s"])),
        ("closing: memory", f"{once['close_memory_bytes'] / 1e9:.1f} GB"),
        ("requests: PUT", f"{once['n_puts'] / 1e6:.1f} million"),
        ("requests: GET", f"{once['n_gets'] / 1e6:.1f} million"),
        ("all requests", f"{once['requests_usd']:.0f} USD"),
        ("keeping the features", f"{once['storage_usd_a_month']:,.0f} USD a month"),
    )
    return ["| | |", "|---|---|", *(harness.row(*cells) for cells in rows)]


def table_of_runs(runs: Sequence[dict[str, float]]) -> list[str]:
    """Tell in Markdown what more GPUs change."""
    rows = {
        "units, blocks each": lambda r: f"{r['n_units']:,} of {r['blocks_a_unit']}",
        "a unit": lambda r: f"{r['unit_s']:.0f} s",
        "a worker's start": lambda r: hours(r["start_s"]),
        "units lost with their GPU": lambda r: f"{r['n_lost']}",
        "rounds": lambda r: f"{r['n_rounds']}",
        "wall time": lambda r: hours(r["wall_s"]),
        "a worker waits for the last ones": lambda r: hours(r["waited_s"]),
        "of the GPUs' time in use": lambda r: f"{100 * r['ideal_s'] / r['wall_s']:.0f} %",
        "closing: workers read and hash all chunks": lambda r: hours(r["close_read_s"]),
        "driver's CPU": lambda r: f"{100 * r['driver_cpu_share']:.2g} % of a core",
        "driver's memory": lambda r: f"{r['driver_bytes'] / 1e9:.1f} GB",
    }
    head = [
        harness.row("GPUs", *(f"{one['n_gpus']:,}" for one in runs)),
        "|---|" + "---|" * len(runs),
    ]
    return head + [harness.row(name, *map(tell, runs)) for name, tell in rows.items()]


def hours(seconds: float) -> str:
    """Tell a time in the unit that suits it.

    >>> hours(90), hours(1800), hours(7200), hours(864000)
    ('90 s', '30 min', '2.0 h', '10 d')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 2 * HOUR_S:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / HOUR_S:.1f} h" if seconds < 100 * HOUR_S else f"{seconds / 86400:.0f} d"
