"""What `benchmarks/run.py` measures: `plan` names the suites, `bench` is what they measure with."""
