"""What a fit reads: features, splits, weights, and what estimators are given."""
