-- What commands on mail of the replicated queue need to know: what a recipient waits for, and what it is bound to.
-- Lock and duration: ACCESS EXCLUSIVE on queue_recipients, milliseconds: columns with constant defaults write no row. Older
-- code does not see them.

ALTER TABLE postroad.queue_recipients
    ADD COLUMN next_hop text NOT NULL DEFAULT '',
    ADD COLUMN pinned boolean NOT NULL DEFAULT false;
COMMENT ON COLUMN postroad.queue_recipients.next_hop IS
    'Provider that it is bound to, was tried with last, or was routed to when it came; empty where nobody told';
-- When what is held ends.
GRANT SELECT (retry_lifetime_s) ON postroad.accounts TO postroad_fleet;
COMMENT ON COLUMN postroad.queue_recipients.pinned IS 'Whether a command bound it to next_hop, whatever the rules choose';
