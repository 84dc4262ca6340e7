"""From measured errors to a decision: table (errors.csv) -> fit -> plan, with flops, plot and report beside them."""
