"""From texts to features. Import the modules themselves: most of them need torch."""
