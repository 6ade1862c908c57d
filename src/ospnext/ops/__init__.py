"""Tensors in, tensors out: token layouts, attention, rotary positions. Torch only; no models, no configuration."""
