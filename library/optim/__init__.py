"""Optimizers for adapter training.

This package knows tensors and names, never files, models or command lines, and imports nothing of
`library` outside itself: it can be copied into another training program as it is.
"""
