"""What can go wrong, by its line of `docs/reliability.md`: `(what happens, what must follow)`.

A test says with `@pytest.mark.fault("46")` whose fact it states; every line has one.
"""

from __future__ import annotations

from collections.abc import Mapping

GROUPS: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "The unit is computed again, nothing is lost": {
        "1": ("SIGKILL before the commit record", "the block is computed again"),
        "2": ("SIGKILL in the middle of a chunk", "no half chunk under its name"),
        "3": ("the host is out of memory", "the killed process is named, a resume completes"),
        "4": ("a process stands still", "a time limit, then a resume completes"),
        "5": (
            "a process writes after its unit was redone",
            "the first record stays, the bytes are the same",
        ),
        "6": ("a CUDA error that stays", "the process is left, a resume completes"),
        "7": ("EIO at write, close, fsync", "one sentence, a resume completes"),
        "8": ("power loss of what was not synced", "`verify` finds the hash that differs"),
        "9": ("a record without its chunk", "found, and computed again"),
        "10": ("half a record", "found, and computed again"),
    },
    "It stops cleanly and can be resumed": {
        "11": ("SIGKILL of the driver", "a resume completes"),
        "12": ("SIGTERM, SIGUSR1, Ctrl-C", "exit codes 75 and 130, the second Ctrl-C at once"),
        "14": ("the disk is full", "one sentence, a resume completes"),
        "15": ("no inodes are left", "one sentence, a resume completes"),
        "16": ("the store is down", "one sentence, a resume completes"),
        "17": ("credentials expire", "one sentence, a resume completes"),
        "18": ("all workers are lost", "an end, not a hang; a resume completes"),
    },
    "It carries on": {
        "19": ("a node is lost", "the rest takes its units"),
        "20": (
            "the GPU is out of memory",
            "half the batch, down to one text, then the row is named",
        ),
        "21": ("a row that fails", "named, the others are complete, exit code 4"),
        "22": ("a fifth of the answers of S3 are 503", "complete, no row differs"),
        "23": ("the acknowledgement of a write is lost", "our own write is known by its attempt"),
        "24": ("the store is slow", "memory stays within its bound"),
        "25": ("clocks differ", "nothing depends on them"),
        "26": ("another number of workers at the resume", "the same bytes"),
        "27": ("file locks do nothing", "nothing depends on them"),
        "28": ("a second driver", "refused, or harmless"),
        "29": ("GPUs differ", "recorded, the tolerance is stated"),
        "30": ("`sys.exit` in a worker", "reported"),
    },
    "It refuses before it writes": {
        "31": ("versions of libraries or of the format that do not fit", "refused"),
        "32": ("the texts changed since", "refused"),
        "33": ("units that are no whole chunks", "refused"),
        "34": ("read-only, over quota, not permitted", "one sentence"),
        "35": ("the store answers 403", "one sentence"),
        "36": ("a store without conditional writes", "said"),
        "37": ("no CPU is free for the scheduler", "refused"),
        "39": ("bad paths, names that differ in case or Unicode form", "refused"),
        "40": ("what another layout left", "refused"),
        "41": ("the record of another plan", "refused"),
        "42": ("a record outside the plan", "refused"),
    },
    "`verify` names the key, a fit stops": {
        "43": ("a missing chunk", "named"),
        "44": ("an empty chunk", "named"),
        "45": ("a chunk cut short", "named"),
        "46": ("a flipped bit in data", "named"),
        "47": ("a flipped bit in the index of a shard", "named"),
    },
    "The reader refuses, with the cause": {
        "48": ("an incomplete cache", "refused"),
        "49": ("JSON that is malformed or nested deep", "refused"),
        "50": ("shapes of 2^62, chunks of 0, numbers of 400 digits", "refused at once"),
        "51": ("a decompression bomb", "refused within bounded memory"),
        "52": ("Zarr v2 and its pickles", "refused, nothing runs"),
        "53": ("an unknown codec or dtype", "refused before zarr opens it"),
        "54": ("a symbolic link inside a store", "refused"),
        "55": ("`../` in names", "refused"),
        "56": ("a newer format", "refused"),
        "57": ("NaN or infinite features", "refused, the row is named"),
        "58": ("labels that do not match", "refused"),
        "59": ("layers that the run was not trained on", "refused"),
    },
    "The trainer, and what people bring": {
        "60": ("SIGKILL during a checkpoint", "the previous one is whole"),
        "61": ("a pickled checkpoint", "refused, nothing runs"),
        "62": ("0, 1 or an odd number of rows", "refused, or fitted"),
        "63": (
            "empty texts, NUL, lone surrogates, 1 MB, right-to-left, emoji",
            "a feature, or one sentence",
        ),
        "64": ("bad UTF-8, BOM, CRLF, quotes in csv", "read, or the line is named"),
        "65": ("ids or columns that repeat", "refused, or counted"),
        "66": ("layers out of range", "refused, the range is said"),
        "67": ("no pad token", "the same features"),
        "68": ("a tokenizer of another vocabulary", "refused"),
        "69": ("safetensors cut short or missing", "the file is named"),
        "70": ("code in a model folder", "refused without its flag, the revision is kept"),
        "71": (
            "the Hub answers 401, 404, 429, nothing, or a proxy does",
            "one sentence with the way out",
        ),
        "72": ("one class, or a class of one row", "refused, or fitted"),
        "73": ("labels as words, ints, bools, floats, mixed, missing", "read, or one sentence"),
        "74": ("10,000 classes", "fitted in bounded memory"),
        "75": ("1 row of 10,000 is of the other class", "fitted, said"),
        "76": ("a split without labels", "extracted, not trained on"),
        "77": ("the same text in train and test", "counted and said"),
    },
    "Security": {
        "S1": ("pickles, anywhere", "none is read or written"),
        "S2": (
            "attributes of a foreign cache",
            "data: no path, no code, no markup, no terminal escapes",
        ),
        "S3": ("paths of archives and names", "resolved inside their root"),
        "S4": ("HDF5 with external, virtual or soft links", "refused before it is read"),
        "S5": ("tokens", "not on a command line, in a log, in a record"),
        "S6": ("what listens", "loopback unless told"),
        "S7": ("Ray", "no dashboard, loopback, tokens, no telemetry"),
        "S8": ("known vulnerabilities of dependencies", "no floor has one"),
        "S9": ("a hostile `--output`", "refused, or replaced whole"),
    },
    "A fault at every operation": {
        "F1": ("an extraction", "resumed, the bytes of the undisturbed one"),
        "F2": ("a fit over an old run", "one whole run, the old or the new"),
        "F3": ("a checkpoint", "the last whole one goes on"),
        "F4": (
            "convert, merge, copy, remove, finalize",
            "done again, the bytes of the undisturbed one",
        ),
        "F5": ("two processes that start, write, read, remove", "neither harms the other"),
    },
    "Fuzzing": {
        "Z1": ("headers of caches and their records", "our sentence or a cache"),
        "Z2": ("HDF5, safetensors, configs of runs", "our sentence or a run"),
        "Z3": ("csv, jsonl, json, parquet, arrow", "our sentence or rows"),
        "Z4": ("layers, templates, labels", "our sentence or a value"),
        "Z5": ("bodies of the server", "4xx in a sentence, or an answer"),
    },
    "A long run, and load": {
        "L1": (
            "extract, kill, resume, extend, fit, predict, serve in random order",
            "the model holds",
        ),
        "L2": ("the server under load, its worker killed", "errors that say so, then answers"),
        "L3": ("S3 under load: 503s, lost acknowledgements, slow", "complete, no row differs"),
    },
}
LINES: Mapping[str, tuple[str, str]] = {
    line: fact for group in GROUPS.values() for line, fact in group.items()
}
