-- no-transaction
DROP INDEX CONCURRENTLY IF EXISTS postroad.ix_replicated_queue_account_uid;
