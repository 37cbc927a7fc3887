"""Runs for people: tables for a terminal, pages and pictures for a browser."""
