"""Dual encoders of other libraries, behind the same few facts as our own."""
