"""Puts the optimizers into a user's own sd-scripts folder, and takes them out again.

`python -m patches apply --target PATH/TO/sd-scripts`. Needs Python alone, so that it runs with
whichever interpreter is at hand.
"""
