"""Optimizers for adapter training (`library.optim`) and the trainer that uses them (`library.training`)."""
