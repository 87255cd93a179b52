-- What nodes are told: bundles, every revision of them, and denials.
-- Lock and duration: new objects only, milliseconds. Older code does not see them.

-- The current form of every bundle of every pool. A deleted one stays as a row without content, so that its revision
-- never goes backwards and readers of changes see the deletion. Changed since a snapshot: change_xid >= that snapshot's
-- xmin.
CREATE TABLE postroad.config_bundles (
    node_pool text NOT NULL,
    bundle text NOT NULL,
    kind smallint NOT NULL,
    account text,
    revision bigint NOT NULL,
    hash bytea,
    content bytea,
    update_time timestamptz NOT NULL DEFAULT transaction_timestamp(),
    change_xid xid8 NOT NULL DEFAULT pg_current_xact_id(),
    CONSTRAINT pk_config_bundles PRIMARY KEY (node_pool, bundle),
    CONSTRAINT ck_config_bundles_kind CHECK (kind BETWEEN 1 AND 4 AND (kind = 1) = (account IS NOT NULL)),
    CONSTRAINT ck_config_bundles_content CHECK ((hash IS NULL) = (content IS NULL) AND length(hash) = 32)
);
CREATE INDEX ix_config_bundles_change_xid ON postroad.config_bundles (change_xid);
CREATE INDEX ix_config_bundles_bundle ON postroad.config_bundles (bundle);
COMMENT ON COLUMN postroad.config_bundles.bundle IS 'Name as in postroad.config.v1.Bundle: accounts/demo, shared/providers, ...';
COMMENT ON COLUMN postroad.config_bundles.kind IS 'As postroad.config.v1.BundleKind';

CREATE TABLE postroad.config_revisions (
    node_pool text NOT NULL,
    bundle text NOT NULL,
    revision bigint NOT NULL,
    kind smallint NOT NULL,
    account text,
    hash bytea NOT NULL,
    content bytea NOT NULL,
    principal text NOT NULL,
    create_time timestamptz NOT NULL DEFAULT transaction_timestamp(),
    CONSTRAINT pk_config_revisions PRIMARY KEY (node_pool, bundle, revision)
);

-- What must stop now. `denial` is the full resource name; kind 1 account, 2 SMTP credential, 3 provider.
CREATE TABLE postroad.denials (
    denial text NOT NULL,
    kind smallint NOT NULL,
    account text,
    since_time timestamptz NOT NULL DEFAULT transaction_timestamp(),
    expire_time timestamptz,
    CONSTRAINT pk_denials PRIMARY KEY (denial),
    CONSTRAINT ck_denials_kind CHECK (kind BETWEEN 1 AND 3)
);
CREATE INDEX ix_denials_expire_time ON postroad.denials (expire_time) WHERE expire_time IS NOT NULL;

-- Moves with every change of the set, in the same transaction.
CREATE TABLE postroad.denial_state (
    singleton boolean NOT NULL DEFAULT true,
    version bigint NOT NULL,
    CONSTRAINT pk_denial_state PRIMARY KEY (singleton),
    CONSTRAINT ck_denial_state_singleton CHECK (singleton)
);
INSERT INTO postroad.denial_state (version) VALUES (1);

DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY['config_bundles', 'config_revisions', 'denials'] LOOP
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

GRANT SELECT, INSERT, UPDATE ON postroad.config_bundles TO postroad_api;
GRANT SELECT, INSERT ON postroad.config_revisions TO postroad_api;
GRANT SELECT, INSERT, UPDATE, DELETE ON postroad.denials TO postroad_api;
GRANT SELECT, UPDATE ON postroad.denial_state TO postroad_api, postroad_fleet;
GRANT SELECT ON postroad.config_bundles TO postroad_fleet;
GRANT SELECT, DELETE ON postroad.config_revisions, postroad.denials TO postroad_fleet;
