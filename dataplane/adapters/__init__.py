"""What fills the ports of the data plane: spools, limiters, resolver, codecs."""
