"""Weights of few bits: their format, which layers have how many, and quantised checkpoint folders. See docs/quantization.md."""
