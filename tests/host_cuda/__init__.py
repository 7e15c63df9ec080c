"""Runs gpubn's CUDA modules where there is no GPU, and compiles their text with NVRTC."""
