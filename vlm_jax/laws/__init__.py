"""From measured errors to a decision: table (errors.csv) -> fitting -> planning; figures and report beside them."""
