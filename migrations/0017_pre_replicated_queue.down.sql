REVOKE SELECT (account, node_pool, uncertain_policy) ON postroad.accounts FROM postroad_fleet;
DROP POLICY pl_accounts_fleet ON postroad.accounts;
ALTER TABLE postroad.accounts DROP COLUMN uncertain_policy;
ALTER TABLE postroad.submission_keys DROP COLUMN content_hash;
ALTER TABLE postroad.messages DROP COLUMN replicated;
DROP TABLE postroad.queue_contents, postroad.queue_recipients, postroad.replicated_queue, postroad.node_leases;
DROP SEQUENCE postroad.lease_epoch;
