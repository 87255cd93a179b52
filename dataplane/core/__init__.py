"""The mail logic as pure functions and machines: standard library only, no I/O, no clock, no randomness of its own."""
