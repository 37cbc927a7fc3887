"""Text -> hidden states of a frozen backbone -> cache."""
