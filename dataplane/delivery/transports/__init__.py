"""Ways to next hops: each opens sessions of its kind for the pools."""
