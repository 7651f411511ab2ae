"""What people do with a client at a command line; each command is a module of its own."""
