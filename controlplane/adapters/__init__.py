"""What fills the ports of the control plane."""
