"""Who computes the blocks of rows: this process, one rank of several, or workers of Ray."""
