"""What the control plane asks of Redis or Valkey: levels of limits, and the requests that API keys may make."""
