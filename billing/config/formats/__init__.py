"""How dates are shown: ISO 8601 everywhere, so that nobody reads a month for a day."""
