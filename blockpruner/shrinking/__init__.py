"""The whole way from a model to a smaller one, as one command."""
