"""Measuring gpubn: every layer's time beside PyTorch's and beside a copy of the same bytes."""
