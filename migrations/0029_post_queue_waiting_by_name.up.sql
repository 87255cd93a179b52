-- Claims no longer go by the name of an account.
-- Lock and duration: ACCESS EXCLUSIVE on replicated_queue, milliseconds. Claims of older code would read the whole queue.

DROP INDEX postroad.ix_replicated_queue_waiting;
