REVOKE SELECT (uid) ON postroad.accounts FROM postroad_fleet;
ALTER TABLE postroad.replicated_queue DROP COLUMN account_uid;
