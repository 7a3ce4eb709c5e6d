"""Kernels for an NVIDIA GPU, a file each, in Triton (Tillet et al. 2019, doi:10.1145/3315508.3329973)."""
