"""What the benchmarks share: where they work, how they measure, other tools, and how figures are shown."""
