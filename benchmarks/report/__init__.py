"""A run as people read it: in the terminal, as a page, as pictures, in the README."""
