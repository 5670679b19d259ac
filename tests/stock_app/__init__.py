"""A Flower app as Flower's quickstart-pytorch writes one; it knows nothing of fedsys."""
