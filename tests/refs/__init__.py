"""Slow, plain twins and small fixtures the tests compare with."""
