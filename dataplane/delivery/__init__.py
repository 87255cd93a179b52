"""Where mail goes out: scheduler, connections, transforms, transports, outcome."""
