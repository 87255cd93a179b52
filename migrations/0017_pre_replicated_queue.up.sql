-- Mail that PostgreSQL owns (accounts with durability REPLICATED), and the leases under which spools hold some of it.
-- A lease is an epoch: a number that is never given twice. A row of the queue that a spool holds names the epoch, so that
-- whatever was done under another one changes nothing. All times here are the database's.
--
--     epoch     claim_id   meaning
--     NULL      NULL       waits; any node of the account's pool may claim it at due_time, of an account a higher priority first
--     a lease   set        claimed and not confirmed: nothing is sent; returns after 60 s
--     a lease   NULL       its recipients in state `sending` (3) are being sent
--
-- A message's content lies in chunks, put there before its row; chunks that no row follows are swept after a day.
-- Lock and duration: new objects, and columns without a rewrite; messages, submission_keys and accounts are locked for milliseconds. Older
-- code does not see them.

CREATE SEQUENCE postroad.lease_epoch AS bigint;

CREATE TABLE postroad.node_leases (
    epoch bigint NOT NULL DEFAULT nextval('postroad.lease_epoch'),
    spool uuid NOT NULL,
    node text NOT NULL,
    begin_time timestamptz NOT NULL DEFAULT transaction_timestamp(),
    lease_until timestamptz NOT NULL,
    CONSTRAINT pk_node_leases PRIMARY KEY (epoch)
);

CREATE TABLE postroad.replicated_queue (
    message_id uuid NOT NULL,
    account text NOT NULL,
    priority smallint NOT NULL DEFAULT 0,
    size_bytes bigint NOT NULL,
    envelope bytea NOT NULL,
    due_time timestamptz NOT NULL,
    epoch bigint,
    claim_id uuid,
    claim_time timestamptz,
    CONSTRAINT pk_replicated_queue PRIMARY KEY (message_id),
    CONSTRAINT ck_replicated_queue_claim CHECK ((claim_id IS NULL) = (claim_time IS NULL)),
    CONSTRAINT ck_replicated_queue_epoch CHECK (claim_id IS NULL OR epoch IS NOT NULL)
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02);
CREATE INDEX ix_replicated_queue_waiting ON postroad.replicated_queue (account, priority, due_time) WHERE epoch IS NULL;
CREATE INDEX ix_replicated_queue_epoch ON postroad.replicated_queue (epoch) WHERE epoch IS NOT NULL;
CREATE INDEX ix_replicated_queue_claim_time ON postroad.replicated_queue (claim_time) WHERE claim_id IS NOT NULL;
COMMENT ON COLUMN postroad.replicated_queue.envelope IS 'As the spool writes it, opaque here';
COMMENT ON COLUMN postroad.replicated_queue.due_time IS 'When the first waiting recipient is due; infinity while all are held';

-- Recipients that have not ended.
CREATE TABLE postroad.queue_recipients (
    message_id uuid NOT NULL,
    recipient_index integer NOT NULL,
    state smallint NOT NULL,
    attempt integer NOT NULL,
    due_time timestamptz NOT NULL,
    CONSTRAINT pk_queue_recipients PRIMARY KEY (message_id, recipient_index),
    CONSTRAINT ck_queue_recipients_state CHECK (state BETWEEN 1 AND 10)
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02);
COMMENT ON COLUMN postroad.queue_recipients.state IS 'As postroad.control.v1.RecipientState';

CREATE TABLE postroad.queue_contents (
    message_id uuid NOT NULL,
    chunk integer NOT NULL,
    data bytea NOT NULL,
    CONSTRAINT pk_queue_contents PRIMARY KEY (message_id, chunk)
);
-- Mail is compressed already or small: trying costs more than it saves.
ALTER TABLE postroad.queue_contents ALTER COLUMN data SET STORAGE EXTERNAL;

ALTER TABLE postroad.messages ADD COLUMN replicated boolean NOT NULL DEFAULT false;
COMMENT ON COLUMN postroad.messages.replicated IS 'Whether spools other than the accepting one may report on it';

-- Whether two messages with one key are the same submission: REPLICATED mail is answered by it, before it is stored.
ALTER TABLE postroad.submission_keys ADD COLUMN content_hash bytea;
ALTER TABLE postroad.submission_keys
    ADD CONSTRAINT ck_submission_keys_content_hash CHECK (length(content_hash) = 32);
COMMENT ON COLUMN postroad.submission_keys.content_hash IS 'SHA-256 of the submission; NULL where its node did not tell';

ALTER TABLE postroad.accounts ADD COLUMN uncertain_policy smallint NOT NULL DEFAULT 1;
ALTER TABLE postroad.accounts ADD CONSTRAINT ck_accounts_uncertain_policy CHECK (uncertain_policy IN (1, 2));
COMMENT ON COLUMN postroad.accounts.uncertain_policy IS '1 retry, 2 hold; as postroad.control.v1.Account.UncertainPolicy';

ALTER TABLE postroad.node_leases ENABLE ROW LEVEL SECURITY;
ALTER TABLE postroad.node_leases FORCE ROW LEVEL SECURITY;
ALTER TABLE postroad.replicated_queue ENABLE ROW LEVEL SECURITY;
ALTER TABLE postroad.replicated_queue FORCE ROW LEVEL SECURITY;
ALTER TABLE postroad.queue_recipients ENABLE ROW LEVEL SECURITY;
ALTER TABLE postroad.queue_recipients FORCE ROW LEVEL SECURITY;
ALTER TABLE postroad.queue_contents ENABLE ROW LEVEL SECURITY;
ALTER TABLE postroad.queue_contents FORCE ROW LEVEL SECURITY;
CREATE POLICY pl_node_leases_fleet ON postroad.node_leases TO postroad_fleet USING (true);
CREATE POLICY pl_replicated_queue_fleet ON postroad.replicated_queue TO postroad_fleet USING (true);
CREATE POLICY pl_queue_recipients_fleet ON postroad.queue_recipients TO postroad_fleet USING (true);
CREATE POLICY pl_queue_contents_fleet ON postroad.queue_contents TO postroad_fleet USING (true);
-- A command with a filter says that it left something alone here.
CREATE POLICY pl_replicated_queue_api ON postroad.replicated_queue FOR SELECT TO postroad_api
    USING (account = (SELECT postroad.current_account()) OR (SELECT postroad.is_operator()));
-- Whose pool a message's account belongs to, and what the account chose.
CREATE POLICY pl_accounts_fleet ON postroad.accounts FOR SELECT TO postroad_fleet USING (true);

GRANT USAGE ON SEQUENCE postroad.lease_epoch TO postroad_fleet;
GRANT SELECT, INSERT, UPDATE, DELETE
    ON postroad.node_leases, postroad.replicated_queue, postroad.queue_recipients, postroad.queue_contents
    TO postroad_fleet;
GRANT SELECT (account, node_pool, uncertain_policy) ON postroad.accounts TO postroad_fleet;
GRANT SELECT (message_id, account, epoch) ON postroad.replicated_queue TO postroad_api;
