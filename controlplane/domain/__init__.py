"""Values and rules of the control plane, without I/O."""
