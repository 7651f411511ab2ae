"""A Triton server of this machine's own: found, started, shared, ended."""
