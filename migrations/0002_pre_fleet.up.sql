-- Node pools, nodes, their keys and spools. Ids in tables are the last part of a resource name: `default`, not
-- `nodePools/default`.
-- Lock and duration: new objects only, milliseconds. Older code does not see them.

CREATE TABLE postroad.node_pools (
    node_pool text NOT NULL,
    uid uuid NOT NULL DEFAULT gen_random_uuid(),
    display_name text NOT NULL DEFAULT '',
    account_messages_per_hour bigint,
    credential_messages_per_hour bigint,
    address_connections_per_minute bigint,
    max_message_bytes bigint,
    max_recipients integer,
    create_time timestamptz NOT NULL DEFAULT transaction_timestamp(),
    update_time timestamptz NOT NULL DEFAULT transaction_timestamp(),
    version bigint NOT NULL DEFAULT 1,
    CONSTRAINT pk_node_pools PRIMARY KEY (node_pool),
    CONSTRAINT uq_node_pools_uid UNIQUE (uid),
    CONSTRAINT ck_node_pools_node_pool CHECK (node_pool ~ '^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$'),
    CONSTRAINT ck_node_pools_display_name CHECK (length(display_name) <= 200),
    CONSTRAINT ck_node_pools_account_messages_per_hour CHECK (account_messages_per_hour >= 0),
    CONSTRAINT ck_node_pools_credential_messages_per_hour CHECK (credential_messages_per_hour >= 0),
    CONSTRAINT ck_node_pools_address_connections_per_minute CHECK (address_connections_per_minute >= 0),
    CONSTRAINT ck_node_pools_max_message_bytes CHECK (max_message_bytes BETWEEN 1024 AND 67108864),
    CONSTRAINT ck_node_pools_max_recipients CHECK (max_recipients BETWEEN 1 AND 10000)
);
COMMENT ON TABLE postroad.node_pools IS 'Sets of nodes; a NULL limit takes the default that the API states.';

-- The key under which secrets in the pool's bundles are sealed, itself sealed under a keyring key.
CREATE TABLE postroad.pool_keys (
    node_pool text NOT NULL,
    key_id text NOT NULL,
    key_sealed bytea NOT NULL,
    create_time timestamptz NOT NULL DEFAULT transaction_timestamp(),
    CONSTRAINT pk_pool_keys PRIMARY KEY (node_pool, key_id),
    CONSTRAINT fk_pool_keys_node_pool FOREIGN KEY (node_pool) REFERENCES postroad.node_pools (node_pool) ON DELETE CASCADE
);
COMMENT ON TABLE postroad.pool_keys IS 'Bundles are sealed under the newest key of their pool; older ones stay readable.';

CREATE TABLE postroad.nodes (
    node text NOT NULL,
    uid uuid NOT NULL DEFAULT gen_random_uuid(),
    display_name text NOT NULL DEFAULT '',
    node_pool text NOT NULL,
    state smallint NOT NULL DEFAULT 1,
    certificate_serial text,
    certificate_fingerprint bytea,
    certificate_key_sha256 bytea,
    certificate_not_before timestamptz,
    certificate_not_after timestamptz,
    create_time timestamptz NOT NULL DEFAULT transaction_timestamp(),
    update_time timestamptz NOT NULL DEFAULT transaction_timestamp(),
    version bigint NOT NULL DEFAULT 1,
    CONSTRAINT pk_nodes PRIMARY KEY (node),
    CONSTRAINT uq_nodes_uid UNIQUE (uid),
    CONSTRAINT fk_nodes_node_pool FOREIGN KEY (node_pool) REFERENCES postroad.node_pools (node_pool),
    CONSTRAINT ck_nodes_node CHECK (node ~ '^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$'),
    CONSTRAINT ck_nodes_display_name CHECK (length(display_name) <= 200),
    CONSTRAINT ck_nodes_state CHECK (state BETWEEN 1 AND 3),
    CONSTRAINT ck_nodes_certificate CHECK (state <> 2 OR certificate_not_after IS NOT NULL)
);
CREATE INDEX ix_nodes_node_pool ON postroad.nodes (node_pool);
COMMENT ON COLUMN postroad.nodes.state IS '1 pending, 2 enrolled, 3 revoked; as postroad.control.v1.Node.State';

-- What a node says of itself; beside `nodes`, so that a heartbeat is neither an edit nor an audit row.
CREATE TABLE postroad.node_status (
    node text NOT NULL,
    connected boolean NOT NULL DEFAULT false,
    replica text NOT NULL DEFAULT '',
    boot_id text NOT NULL DEFAULT '',
    software_version text NOT NULL DEFAULT '',
    last_seen_time timestamptz,
    config_status smallint NOT NULL DEFAULT 2,
    config_error text NOT NULL DEFAULT '',
    config_refused jsonb NOT NULL DEFAULT '{}',
    config_digest bytea,
    denials_version bigint NOT NULL DEFAULT 0,
    draining boolean NOT NULL DEFAULT false,
    queue_depth bigint NOT NULL DEFAULT 0,
    oldest_age_s double precision NOT NULL DEFAULT 0,
    clock_skew_s double precision NOT NULL DEFAULT 0,
    CONSTRAINT pk_node_status PRIMARY KEY (node),
    CONSTRAINT fk_node_status_node FOREIGN KEY (node) REFERENCES postroad.nodes (node) ON DELETE CASCADE,
    CONSTRAINT ck_node_status_config_status CHECK (config_status BETWEEN 1 AND 4)
);
COMMENT ON COLUMN postroad.node_status.config_status IS '1 synced, 2 not sent, 3 stale, 4 error; as postroad.control.v1.Node.ConfigStatus';

CREATE TABLE postroad.enrollment_tokens (
    token_sha256 bytea NOT NULL,
    node text NOT NULL,
    create_time timestamptz NOT NULL DEFAULT transaction_timestamp(),
    expire_time timestamptz NOT NULL,
    use_time timestamptz,
    CONSTRAINT pk_enrollment_tokens PRIMARY KEY (token_sha256),
    CONSTRAINT fk_enrollment_tokens_node FOREIGN KEY (node) REFERENCES postroad.nodes (node) ON DELETE CASCADE,
    CONSTRAINT ck_enrollment_tokens_expire_time CHECK (expire_time > create_time)
);
CREATE INDEX ix_enrollment_tokens_node ON postroad.enrollment_tokens (node);
CREATE INDEX ix_enrollment_tokens_expire_time ON postroad.enrollment_tokens (expire_time);

-- `incarnation` and `cursor` are what the ledger holds; `reported_*` is what the spool said last. AcceptSpool copies
-- the latter over the former.
CREATE TABLE postroad.spools (
    spool uuid NOT NULL,
    node text NOT NULL,
    incarnation bigint NOT NULL DEFAULT 0,
    cursor bigint NOT NULL DEFAULT 0,
    accepted boolean NOT NULL DEFAULT true,
    reported_incarnation bigint NOT NULL DEFAULT 0,
    reported_last_record bigint NOT NULL DEFAULT 0,
    waiting_count bigint NOT NULL DEFAULT 0,
    create_time timestamptz NOT NULL DEFAULT transaction_timestamp(),
    update_time timestamptz NOT NULL DEFAULT transaction_timestamp(),
    CONSTRAINT pk_spools PRIMARY KEY (spool),
    CONSTRAINT fk_spools_node FOREIGN KEY (node) REFERENCES postroad.nodes (node) ON DELETE CASCADE,
    CONSTRAINT ck_spools_cursor CHECK (cursor >= 0 AND incarnation >= 0)
);
CREATE INDEX ix_spools_node ON postroad.spools (node);

CREATE TRIGGER touch BEFORE UPDATE ON postroad.node_pools FOR EACH ROW EXECUTE FUNCTION postroad.touch();
CREATE TRIGGER touch BEFORE UPDATE OF display_name, node_pool, state ON postroad.nodes
    FOR EACH ROW EXECUTE FUNCTION postroad.touch();
CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON postroad.node_pools
    FOR EACH ROW EXECUTE FUNCTION postroad.audit();
CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON postroad.nodes
    FOR EACH ROW EXECUTE FUNCTION postroad.audit();
CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON postroad.pool_keys
    FOR EACH ROW EXECUTE FUNCTION postroad.audit();

-- No account owns any of this: operators only, except that an account's edit reads its pool and the pool's key.
DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY['node_pools', 'pool_keys', 'nodes', 'node_status', 'enrollment_tokens', 'spools'] LOOP
        EXECUTE format('ALTER TABLE postroad.%I ENABLE ROW LEVEL SECURITY', name);
        EXECUTE format('ALTER TABLE postroad.%I FORCE ROW LEVEL SECURITY', name);
        EXECUTE format(
            'CREATE POLICY %I ON postroad.%I TO postroad_api USING ((SELECT postroad.is_operator()))',
            'pl_' || name || '_operator', name
        );
        EXECUTE format(
            'CREATE POLICY %I ON postroad.%I TO postroad_fleet USING (true)', 'pl_' || name || '_fleet', name
        );
    END LOOP;
END
$$;
CREATE POLICY pl_node_pools_account ON postroad.node_pools FOR SELECT TO postroad_api
    USING ((SELECT postroad.current_account()) <> '');
CREATE POLICY pl_pool_keys_account ON postroad.pool_keys FOR SELECT TO postroad_api
    USING ((SELECT postroad.current_account()) <> '');

GRANT SELECT, INSERT, UPDATE, DELETE ON postroad.node_pools, postroad.nodes, postroad.enrollment_tokens TO postroad_api;
GRANT SELECT, INSERT, DELETE ON postroad.pool_keys TO postroad_api;
GRANT SELECT, DELETE ON postroad.node_status TO postroad_api;
GRANT SELECT, UPDATE, DELETE ON postroad.spools TO postroad_api;
GRANT SELECT ON postroad.node_pools, postroad.pool_keys TO postroad_fleet;
GRANT SELECT, UPDATE ON postroad.nodes TO postroad_fleet;
GRANT SELECT, UPDATE, DELETE ON postroad.enrollment_tokens TO postroad_fleet;
GRANT SELECT, INSERT, UPDATE, DELETE ON postroad.node_status, postroad.spools TO postroad_fleet;
