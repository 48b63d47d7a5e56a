"""The CPU executor: attention on NumPy arrays, tiled over BLAS. See docs/cpu.md."""
