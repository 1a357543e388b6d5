"""What is done with the method: weights from scratch, tables, sweeps, figures, benchmarks."""
