"""benchmarks: the figures that the project promises, each ours over a reference in one run; see docs/benchmarks.md."""
