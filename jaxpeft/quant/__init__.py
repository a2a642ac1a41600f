"""Quantized weights: packed formats and their arithmetic."""
