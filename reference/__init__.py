"""Plain NumPy kernels: what every fast kernel is checked against."""
