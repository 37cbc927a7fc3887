"""Cache -> fused features -> classifier."""
