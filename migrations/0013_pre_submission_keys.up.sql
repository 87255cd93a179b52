-- Which message has an Idempotency-Key, so that one that two spools stored is found; spools ask Redis first.
-- One row a key, not one a message: who inserts second waits for the first and sees its row, whatever is being committed.
-- Mail without a key costs nothing here. Like the mail tables it has no triggers and no foreign keys.
-- Lock and duration: a new table; ACCESS EXCLUSIVE on messages and its partitions, milliseconds: a column without a
-- default writes no row. Older code sees neither.

CREATE TABLE postroad.submission_keys (
    account text NOT NULL,
    key_hash bytea NOT NULL,
    message_id uuid NOT NULL,
    accept_time timestamptz NOT NULL,
    checked boolean NOT NULL,
    CONSTRAINT pk_submission_keys PRIMARY KEY (account, key_hash),
    CONSTRAINT ck_submission_keys_key_hash CHECK (length(key_hash) = 32)
);
CREATE INDEX ix_submission_keys_accept_time ON postroad.submission_keys (accept_time);
COMMENT ON COLUMN postroad.submission_keys.key_hash IS 'SHA-256 of the uid of the account, a NUL and the key';
COMMENT ON COLUMN postroad.submission_keys.checked IS 'Redis was asked before the message was stored';

ALTER TABLE postroad.messages ADD COLUMN duplicate_of uuid;
COMMENT ON COLUMN postroad.messages.duplicate_of IS 'Message that was stored before under the same Idempotency-Key';

ALTER TABLE postroad.submission_keys ENABLE ROW LEVEL SECURITY;
ALTER TABLE postroad.submission_keys FORCE ROW LEVEL SECURITY;
CREATE POLICY pl_submission_keys_fleet ON postroad.submission_keys TO postroad_fleet USING (true);
GRANT SELECT, INSERT, UPDATE, DELETE ON postroad.submission_keys TO postroad_fleet;
