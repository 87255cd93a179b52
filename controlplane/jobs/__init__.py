"""What the leader among the replicas runs."""
