"""One server: its address, what is sent and read, and what it says of the model it serves."""
