"""Numbers only: codes, ranges, rounding and the layers that use them."""
