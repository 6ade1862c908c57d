"""Measuring what a model does, with figures that say how sure they are."""
