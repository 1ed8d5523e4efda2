"""Checkpoints as others meet them."""
