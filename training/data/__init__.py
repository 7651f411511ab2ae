"""What training reads: pairs of images and texts, in an order anyone can seek in."""
