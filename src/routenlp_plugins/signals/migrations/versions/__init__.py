"""One module for each version, written once and never changed."""
