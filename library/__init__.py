"""Optimizers for adapter training (`optim`) and the trainer that uses them (`training`)."""
