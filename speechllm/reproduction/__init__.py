"""Re-measure the paper's claims: rows x fractions x seeds, tables, curves and verdicts (`speechllm reproduce`)."""
