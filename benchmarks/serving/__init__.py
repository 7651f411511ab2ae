"""What the client adds to the server behind it: `python -m benchmarks.serving`."""
