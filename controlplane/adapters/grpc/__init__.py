"""gRPC servers: handlers, interceptors, the table of errors."""
