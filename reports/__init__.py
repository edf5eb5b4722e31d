"""What it meant: metrics, prices, comparison, gate, tables."""
