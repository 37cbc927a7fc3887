"""Who computes the blocks of rows: this process (alone or as one rank), or workers of Ray.

An engine is a module with two functions. `begin(task, plans, cluster)` makes ready what is not to
be timed, and returns the work: called with what counts rows and real tokens, it does the missing
blocks and returns `Counts`. `finish(task)` does what an earlier run was kept from doing
after its last block.
"""

ENGINES = {
    "local": "llmembed.extract.engines.local",
    "ray": "llmembed.extract.engines.ray_engine",
}
