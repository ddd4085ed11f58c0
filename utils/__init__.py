"""Making models from configuration files (`model_factory`), and small helps for that."""
