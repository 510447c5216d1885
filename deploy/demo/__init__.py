"""The demonstration: a month of history, live traffic by the official client, a close, and its documents."""
