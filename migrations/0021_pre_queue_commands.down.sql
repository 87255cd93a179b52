REVOKE SELECT (retry_lifetime_s) ON postroad.accounts FROM postroad_fleet;
ALTER TABLE postroad.queue_recipients
    DROP COLUMN next_hop,
    DROP COLUMN pinned;
