"""Chains of techniques as machine code: translated to C++, compiled once, run on the tensors where
they lie."""
