"""`postroad-bench`: load from several processes, a sink that keeps a ledger, and figures checked against it."""
