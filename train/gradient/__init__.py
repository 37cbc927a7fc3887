"""Fits by gradient, through Lightning."""
