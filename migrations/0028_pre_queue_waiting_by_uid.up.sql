-- no-transaction
-- What waits for claims, by the account whose it is and not by its name. Older code goes by ix_replicated_queue_waiting.
-- Lock and duration: none that stops anybody; as long as it takes to read the queue.
CREATE INDEX CONCURRENTLY IF NOT EXISTS ix_replicated_queue_account_uid
    ON postroad.replicated_queue (account_uid, priority, due_time) WHERE epoch IS NULL;
