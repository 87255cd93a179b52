-- Messages that are sent by API: what the sender notes of one. They are born in the replicated queue, stored by
-- postroad_fleet like all mail.
-- Lock and duration: ACCESS EXCLUSIVE on messages and its partitions for new columns without a rewrite, milliseconds.
-- Older code names its columns and does not notice.

ALTER TABLE postroad.messages
    ADD COLUMN tags text[] NOT NULL DEFAULT '{}',
    ADD COLUMN metadata jsonb NOT NULL DEFAULT '{}';
COMMENT ON COLUMN postroad.messages.tags IS 'What the sender calls it by, by API only';
