"""Target and proxy models: loading, naming their linear layers, swapping in factors."""
