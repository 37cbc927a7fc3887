"""A run behind a URL: requests that come at the same time share passes through the backbone."""
