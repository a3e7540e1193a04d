"""Mixers for mixerbench: one module each, and configs/mixer/<name>.yaml beside it."""
