CREATE INDEX ix_replicated_queue_waiting ON postroad.replicated_queue (account, priority, due_time) WHERE epoch IS NULL;
