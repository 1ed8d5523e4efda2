"""What came out: retrieval per layer, error rates, plots."""
