"""The trainer behind `train_network.py`; docs/ARCHITECTURE.md draws how its modules meet."""
