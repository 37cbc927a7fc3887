"""Heads that are solved from moments of the features."""
