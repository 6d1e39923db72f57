"""`python -m harness doctor`: could the run start here, and what would it take? Computes no result."""
