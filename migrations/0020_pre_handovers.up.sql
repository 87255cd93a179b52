-- Mail that one spool gave up and another one takes over, drains of nodes, and who took how much.
--
--     handovers.spool   what it means
--     NULL              waits for a spool of the pool that takes it
--     a spool           that spool's from now on, and given to it until it says that it has it: then the row goes
--
-- While there is a row `messages.spool` is 00000000-0000-0000-0000-000000000000. Pieces of content come before the row.
-- Lock and duration: ACCESS EXCLUSIVE on nodes and node_status, milliseconds: columns without a default or with a constant
-- one write no row. The rest are new objects. Older code does not see them; it sets aside the records that tell of them.

CREATE TABLE postroad.handovers (
    message_id uuid NOT NULL,
    account text NOT NULL,
    node_pool text NOT NULL,
    from_spool uuid NOT NULL,
    drain uuid,
    what bytea NOT NULL,
    content_bytes bigint NOT NULL,
    operations uuid[] NOT NULL,
    spool uuid,
    create_time timestamptz NOT NULL DEFAULT transaction_timestamp(),
    CONSTRAINT pk_handovers PRIMARY KEY (message_id),
    CONSTRAINT fk_handovers_spool FOREIGN KEY (spool) REFERENCES postroad.spools (spool) ON DELETE SET NULL
);
CREATE INDEX ix_handovers_waiting ON postroad.handovers (node_pool, create_time) WHERE spool IS NULL;
CREATE INDEX ix_handovers_spool ON postroad.handovers (spool, create_time) WHERE spool IS NOT NULL;
CREATE INDEX ix_handovers_from_spool ON postroad.handovers (from_spool);
COMMENT ON COLUMN postroad.handovers.what IS 'Serialised postroad.node.v1.HandedOver';
COMMENT ON COLUMN postroad.handovers.operations IS 'Commands with a filter that the giving spool had not ended: its taker gets them, too';

CREATE TABLE postroad.handover_contents (
    message_id uuid NOT NULL,
    piece integer NOT NULL,
    data bytea NOT NULL,
    create_time timestamptz NOT NULL DEFAULT transaction_timestamp(),
    CONSTRAINT pk_handover_contents PRIMARY KEY (message_id, piece)
);
-- Mail is compressed already or small: trying costs more than it saves.
ALTER TABLE postroad.handover_contents ALTER COLUMN data SET STORAGE EXTERNAL;

CREATE TABLE postroad.node_drains (
    drain uuid NOT NULL DEFAULT gen_random_uuid(),
    node text NOT NULL,
    create_time timestamptz NOT NULL DEFAULT transaction_timestamp(),
    end_time timestamptz,
    undrained boolean NOT NULL DEFAULT false,
    CONSTRAINT pk_node_drains PRIMARY KEY (drain),
    CONSTRAINT ck_node_drains_undrained CHECK (end_time IS NOT NULL OR NOT undrained)
);
CREATE INDEX ix_node_drains_open ON postroad.node_drains (node) WHERE end_time IS NULL;

CREATE TABLE postroad.drain_targets (
    drain uuid NOT NULL,
    node text NOT NULL,
    message_count bigint NOT NULL,
    recipient_count bigint NOT NULL,
    CONSTRAINT pk_drain_targets PRIMARY KEY (drain, node)
);

ALTER TABLE postroad.nodes ADD COLUMN drain uuid;
COMMENT ON COLUMN postroad.nodes.drain IS 'The drain that keeps it from taking mail';
ALTER TABLE postroad.node_status ADD COLUMN closed boolean NOT NULL DEFAULT false;
COMMENT ON COLUMN postroad.node_status.closed IS 'As postroad.node.v1.StatusReport';

DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY['handovers', 'handover_contents', 'node_drains', 'drain_targets'] LOOP
        EXECUTE format('ALTER TABLE postroad.%I ENABLE ROW LEVEL SECURITY', name);
        EXECUTE format('ALTER TABLE postroad.%I FORCE ROW LEVEL SECURITY', name);
        EXECUTE format(
            'CREATE POLICY %I ON postroad.%I TO postroad_fleet USING (true)', 'pl_' || name || '_fleet', name
        );
    END LOOP;
    FOREACH name IN ARRAY ARRAY['handovers', 'node_drains', 'drain_targets'] LOOP
        EXECUTE format(
            'CREATE POLICY %I ON postroad.%I TO postroad_api USING ((SELECT postroad.is_operator()))',
            'pl_' || name || '_operator', name
        );
    END LOOP;
END
$$;
-- Undoing this asks whether there are any.
CREATE POLICY pl_handovers_owner ON postroad.handovers FOR SELECT TO postroad_owner USING (true);
GRANT SELECT ON postroad.handovers, postroad.drain_targets TO postroad_api;
GRANT SELECT, INSERT, UPDATE ON postroad.node_drains TO postroad_api;
GRANT SELECT, INSERT, UPDATE, DELETE ON postroad.handovers, postroad.handover_contents TO postroad_fleet;
GRANT SELECT, INSERT, UPDATE ON postroad.node_drains, postroad.drain_targets TO postroad_fleet;
GRANT INSERT ON postroad.commands TO postroad_fleet;
