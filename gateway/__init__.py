"""The data plane: a token-counting proxy in front of model providers. Never imports Django."""
