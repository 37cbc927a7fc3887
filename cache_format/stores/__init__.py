"""Where the bytes of a cache lie, and who may write them."""
