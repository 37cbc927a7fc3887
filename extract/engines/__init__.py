"""Who computes which blocks: this process, ranks, or Ray."""
