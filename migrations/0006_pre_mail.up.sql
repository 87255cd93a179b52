-- The record of every message, commands to spools, and what the ledger could not store.
-- Mail tables have neither triggers nor foreign keys: they are written in bulk by postroad_fleet. `account`, `node`,
-- `credential`, `rule` and `provider` hold: account and node ids without prefix (`demo`, `node-1`), the others as the
-- node reported them (full resource names).
-- Lock and duration: new objects only, milliseconds. Older code does not see them.

-- Positions of events. Read only rows whose change_xid lies below pg_snapshot_xmin(pg_current_snapshot()): below it
-- nothing can appear any more, so that (change_xid, position) is an order one can resume from.
CREATE SEQUENCE postroad.ledger_position AS bigint;

CREATE TABLE postroad.messages (
    message_id uuid NOT NULL,
    account text NOT NULL,
    accept_time timestamptz NOT NULL,
    sender text NOT NULL,
    size_bytes bigint NOT NULL,
    header_message_id text NOT NULL,
    subject text NOT NULL,
    credential text NOT NULL,
    client_address text NOT NULL,
    client_helo text NOT NULL,
    client_tls text NOT NULL,
    session text NOT NULL,
    node text NOT NULL,
    spool uuid NOT NULL,
    change_xid xid8 NOT NULL DEFAULT pg_current_xact_id(),
    position bigint NOT NULL DEFAULT nextval('postroad.ledger_position'),
    CONSTRAINT pk_messages PRIMARY KEY (message_id)
) PARTITION BY RANGE (message_id);
CREATE INDEX ix_messages_account_message_id ON postroad.messages (account, message_id);
CREATE INDEX ix_messages_account_position ON postroad.messages (account, change_xid, position);

CREATE TABLE postroad.recipients (
    message_id uuid NOT NULL,
    recipient_index integer NOT NULL,
    account text NOT NULL,
    address text NOT NULL,
    state smallint NOT NULL,
    attempts integer NOT NULL,
    next_attempt_time timestamptz,
    update_time timestamptz NOT NULL,
    reply_code smallint NOT NULL DEFAULT 0,
    enhanced_code text NOT NULL DEFAULT '',
    reply_text text NOT NULL DEFAULT '',
    provider text NOT NULL DEFAULT '',
    CONSTRAINT pk_recipients PRIMARY KEY (message_id, recipient_index),
    CONSTRAINT ck_recipients_state CHECK (state BETWEEN 1 AND 10)
) PARTITION BY RANGE (message_id);
CREATE INDEX ix_recipients_account_address ON postroad.recipients (account, address, message_id);
-- Nearly all are `sent` (6); looking for those walks messages instead.
CREATE INDEX ix_recipients_account_state ON postroad.recipients (account, state, message_id) WHERE state <> 6;
COMMENT ON COLUMN postroad.recipients.state IS 'As postroad.control.v1.RecipientState';

CREATE TABLE postroad.delivery_events (
    message_id uuid NOT NULL,
    position bigint NOT NULL DEFAULT nextval('postroad.ledger_position'),
    change_xid xid8 NOT NULL DEFAULT pg_current_xact_id(),
    account text NOT NULL,
    recipient_index integer,
    type smallint NOT NULL,
    event_time timestamptz NOT NULL,
    node text NOT NULL,
    spool uuid NOT NULL,
    attempt integer NOT NULL DEFAULT 0,
    bundle_revision bigint NOT NULL DEFAULT 0,
    rule text NOT NULL DEFAULT '',
    provider text NOT NULL DEFAULT '',
    remote_host text NOT NULL DEFAULT '',
    tls text NOT NULL DEFAULT '',
    reply_code smallint NOT NULL DEFAULT 0,
    enhanced_code text NOT NULL DEFAULT '',
    reply_text text NOT NULL DEFAULT '',
    queued_ms bigint NOT NULL DEFAULT 0,
    waiting_ms bigint NOT NULL DEFAULT 0,
    connecting_ms bigint NOT NULL DEFAULT 0,
    transferring_ms bigint NOT NULL DEFAULT 0,
    CONSTRAINT pk_delivery_events PRIMARY KEY (message_id, position),
    CONSTRAINT ck_delivery_events_type CHECK (type BETWEEN 1 AND 10)
) PARTITION BY RANGE (message_id);
CREATE INDEX ix_delivery_events_account_position ON postroad.delivery_events (account, change_xid, position);
COMMENT ON COLUMN postroad.delivery_events.type IS 'As postroad.control.v1.DeliveryEventType; ACCEPTED is derived from messages';
COMMENT ON COLUMN postroad.delivery_events.recipient_index IS 'One row per recipient of an attempt; NULL for the whole message';

-- Edge verbs for spools, and the Operations that the API shows. Pending while done_time is NULL.
CREATE TABLE postroad.commands (
    command uuid NOT NULL DEFAULT gen_random_uuid(),
    account text NOT NULL,
    verb smallint NOT NULL,
    spool uuid NOT NULL,
    message_ids uuid[] NOT NULL,
    create_time timestamptz NOT NULL DEFAULT transaction_timestamp(),
    done_time timestamptz,
    changed_count integer NOT NULL DEFAULT 0,
    too_late_count integer NOT NULL DEFAULT 0,
    error text NOT NULL DEFAULT '',
    CONSTRAINT pk_commands PRIMARY KEY (command),
    CONSTRAINT ck_commands_verb CHECK (verb = 1)
);
CREATE INDEX ix_commands_pending ON postroad.commands (spool) WHERE done_time IS NULL;
CREATE INDEX ix_commands_account_command ON postroad.commands (account, command);
COMMENT ON COLUMN postroad.commands.verb IS 'As postroad.node.v1.Command.Verb';

CREATE TABLE postroad.ledger_rejects (
    reject_id bigint GENERATED ALWAYS AS IDENTITY,
    node text NOT NULL,
    spool uuid NOT NULL,
    incarnation bigint NOT NULL,
    record_number bigint NOT NULL,
    record bytea NOT NULL,
    reason text NOT NULL,
    detail text NOT NULL,
    create_time timestamptz NOT NULL DEFAULT transaction_timestamp(),
    CONSTRAINT pk_ledger_rejects PRIMARY KEY (reject_id)
);
CREATE INDEX ix_ledger_rejects_create_time ON postroad.ledger_rejects (create_time);

-- The least UUIDv7 of a day (RFC 9562, section 5.7: 48 bits of milliseconds first), UTC.
CREATE FUNCTION postroad.message_id_bound(day date) RETURNS uuid
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN (lpad(to_hex((day - date '1970-01-01')::bigint * 86400000), 12, '0') || repeat('0', 20))::uuid;

-- Makes the partitions of `days` days from `from_day` on that are missing; returns how many it made. Attaches instead of
-- creating in place, so that writers of other days are not stopped.
CREATE FUNCTION postroad.ensure_partitions(from_day date, days integer) RETURNS integer
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET lock_timeout = '5s'
AS $$
DECLARE
    parent text;
    partition text;
    day date;
    made integer := 0;
BEGIN
    IF days NOT BETWEEN 0 AND 400 THEN
        RAISE EXCEPTION 'days must be 0 to 400' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    PERFORM pg_advisory_xact_lock(hashtextextended('postroad.ensure_partitions', 0));
    FOREACH parent IN ARRAY ARRAY['messages', 'recipients', 'delivery_events'] LOOP
        FOR day IN SELECT from_day + n FROM generate_series(0, days - 1) AS n LOOP
            partition := parent || '_' || to_char(day, 'YYYYMMDD');
            CONTINUE WHEN to_regclass(format('postroad.%I', partition)) IS NOT NULL;
            EXECUTE format(
                'CREATE TABLE postroad.%I (LIKE postroad.%I INCLUDING DEFAULTS INCLUDING CONSTRAINTS)', partition, parent
            );
            -- Reached through the parent only; without a policy of its own it shows nothing to anyone else.
            EXECUTE format('ALTER TABLE postroad.%I ENABLE ROW LEVEL SECURITY', partition);
            EXECUTE format('ALTER TABLE postroad.%I FORCE ROW LEVEL SECURITY', partition);
            EXECUTE format(
                'ALTER TABLE postroad.%I ATTACH PARTITION postroad.%I FOR VALUES FROM (%L) TO (%L)',
                parent, partition, postroad.message_id_bound(day), postroad.message_id_bound(day + 1)
            );
            made := made + 1;
        END LOOP;
    END LOOP;
    RETURN made;
END
$$;

-- Drops the partitions of days before `before_day`; returns how many. Fails on its lock timeout rather than stopping
-- writers: call again later.
CREATE FUNCTION postroad.drop_partitions(before_day date) RETURNS integer
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET lock_timeout = '2s'
AS $$
DECLARE
    partition text;
    dropped integer := 0;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended('postroad.ensure_partitions', 0));
    FOR partition IN
        SELECT child.relname
        FROM pg_inherits
        JOIN pg_class AS child ON child.oid = inhrelid
        JOIN pg_class AS parent ON parent.oid = inhparent
        JOIN pg_namespace AS namespace ON namespace.oid = parent.relnamespace
        WHERE namespace.nspname = 'postroad'
            AND parent.relname IN ('messages', 'recipients', 'delivery_events')
            AND to_date(right(child.relname, 8), 'YYYYMMDD') < before_day
        ORDER BY child.relname
    LOOP
        EXECUTE format('DROP TABLE postroad.%I', partition);
        dropped := dropped + 1;
    END LOOP;
    RETURN dropped;
END
$$;

REVOKE EXECUTE ON FUNCTION postroad.ensure_partitions(date, integer), postroad.drop_partitions(date) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION postroad.ensure_partitions(date, integer), postroad.drop_partitions(date) TO postroad_fleet;

DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY['messages', 'recipients', 'delivery_events', 'commands'] LOOP
        EXECUTE format('ALTER TABLE postroad.%I ENABLE ROW LEVEL SECURITY', name);
        EXECUTE format('ALTER TABLE postroad.%I FORCE ROW LEVEL SECURITY', name);
        EXECUTE format(
            'CREATE POLICY %I ON postroad.%I TO postroad_api '
            'USING (account = (SELECT postroad.current_account()) OR (SELECT postroad.is_operator()))',
            'pl_' || name || '_api', name
        );
        EXECUTE format(
            'CREATE POLICY %I ON postroad.%I TO postroad_fleet USING (true)', 'pl_' || name || '_fleet', name
        );
    END LOOP;
END
$$;
ALTER TABLE postroad.ledger_rejects ENABLE ROW LEVEL SECURITY;
ALTER TABLE postroad.ledger_rejects FORCE ROW LEVEL SECURITY;
CREATE POLICY pl_ledger_rejects_operator ON postroad.ledger_rejects TO postroad_api
    USING ((SELECT postroad.is_operator()));
CREATE POLICY pl_ledger_rejects_fleet ON postroad.ledger_rejects TO postroad_fleet USING (true);

GRANT SELECT ON postroad.messages, postroad.recipients, postroad.delivery_events, postroad.ledger_rejects TO postroad_api;
GRANT SELECT, INSERT ON postroad.commands TO postroad_api;
GRANT USAGE ON SEQUENCE postroad.ledger_position TO postroad_fleet;
GRANT SELECT, INSERT, UPDATE ON postroad.messages, postroad.recipients, postroad.delivery_events TO postroad_fleet;
GRANT SELECT, UPDATE, DELETE ON postroad.commands TO postroad_fleet;
GRANT SELECT, INSERT, DELETE ON postroad.ledger_rejects TO postroad_fleet;
