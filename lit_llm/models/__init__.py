"""Network: components put together. `config.py` resolves what a study wrote into an explicit list of layers."""
