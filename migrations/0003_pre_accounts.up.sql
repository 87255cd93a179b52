-- Accounts, what belongs to them exclusively (domains, networks), and the keys of their callers.
-- Lock and duration: new objects only, milliseconds. Older code does not see them.

CREATE TABLE postroad.accounts (
    account text NOT NULL,
    uid uuid NOT NULL DEFAULT gen_random_uuid(),
    display_name text NOT NULL DEFAULT '',
    state smallint NOT NULL DEFAULT 1,
    suspend_reason text NOT NULL DEFAULT '',
    durability smallint NOT NULL DEFAULT 1,
    node_pool text NOT NULL,
    retry_base_s double precision,
    retry_factor double precision,
    retry_cap_s double precision,
    retry_lifetime_s double precision,
    messages_since timestamptz,
    create_time timestamptz NOT NULL DEFAULT transaction_timestamp(),
    update_time timestamptz NOT NULL DEFAULT transaction_timestamp(),
    version bigint NOT NULL DEFAULT 1,
    CONSTRAINT pk_accounts PRIMARY KEY (account),
    CONSTRAINT uq_accounts_uid UNIQUE (uid),
    CONSTRAINT fk_accounts_node_pool FOREIGN KEY (node_pool) REFERENCES postroad.node_pools (node_pool),
    CONSTRAINT ck_accounts_account CHECK (account ~ '^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$'),
    CONSTRAINT ck_accounts_display_name CHECK (length(display_name) <= 200),
    CONSTRAINT ck_accounts_state CHECK (state IN (1, 2)),
    CONSTRAINT ck_accounts_suspend_reason CHECK (length(suspend_reason) <= 500 AND (state = 2 OR suspend_reason = '')),
    CONSTRAINT ck_accounts_durability CHECK (durability IN (1, 2)),
    CONSTRAINT ck_accounts_retry_policy CHECK (
        retry_base_s BETWEEN 1 AND 86400
        AND retry_factor BETWEEN 1 AND 10
        AND retry_cap_s >= coalesce(retry_base_s, 1)
        AND retry_lifetime_s BETWEEN 60 AND 2592000
    )
);
CREATE INDEX ix_accounts_node_pool ON postroad.accounts (node_pool);
COMMENT ON COLUMN postroad.accounts.state IS '1 active, 2 suspended';
COMMENT ON COLUMN postroad.accounts.durability IS '1 LOCAL, 2 REPLICATED';
COMMENT ON COLUMN postroad.accounts.messages_since IS
    'Set where an account of this id existed before: mail accepted earlier was the former one''s and is not shown.';

-- Ids that once named an account: its mail outlives it until retention.
CREATE TABLE postroad.former_accounts (
    account text NOT NULL,
    delete_time timestamptz NOT NULL DEFAULT transaction_timestamp(),
    CONSTRAINT pk_former_accounts PRIMARY KEY (account)
);

CREATE TABLE postroad.account_sender_domains (
    account text NOT NULL,
    domain text NOT NULL,
    position smallint NOT NULL,
    CONSTRAINT pk_account_sender_domains PRIMARY KEY (account, domain),
    CONSTRAINT uq_account_sender_domains_domain UNIQUE (domain),
    CONSTRAINT fk_account_sender_domains_account FOREIGN KEY (account) REFERENCES postroad.accounts (account) ON DELETE CASCADE,
    CONSTRAINT ck_account_sender_domains_domain CHECK (length(domain) BETWEEN 1 AND 255 AND domain = lower(domain))
);

CREATE TABLE postroad.account_networks (
    account text NOT NULL,
    network cidr NOT NULL,
    position smallint NOT NULL,
    CONSTRAINT pk_account_networks PRIMARY KEY (account, network),
    CONSTRAINT fk_account_networks_account FOREIGN KEY (account) REFERENCES postroad.accounts (account) ON DELETE CASCADE,
    CONSTRAINT ck_account_networks_network CHECK (masklen(network) > 0),
    CONSTRAINT ex_account_networks_network EXCLUDE USING gist (network inet_ops WITH &&)
);

CREATE TABLE postroad.api_keys (
    uid uuid NOT NULL DEFAULT gen_random_uuid(),
    account text,
    api_key text NOT NULL,
    display_name text NOT NULL DEFAULT '',
    scopes text[] NOT NULL,
    lookup text NOT NULL,
    secret_sha256 bytea NOT NULL,
    expire_time timestamptz,
    revoke_time timestamptz,
    last_use_time timestamptz,
    create_time timestamptz NOT NULL DEFAULT transaction_timestamp(),
    update_time timestamptz NOT NULL DEFAULT transaction_timestamp(),
    version bigint NOT NULL DEFAULT 1,
    CONSTRAINT pk_api_keys PRIMARY KEY (uid),
    CONSTRAINT uq_api_keys_account_api_key UNIQUE NULLS NOT DISTINCT (account, api_key),
    CONSTRAINT uq_api_keys_lookup UNIQUE (lookup),
    CONSTRAINT fk_api_keys_account FOREIGN KEY (account) REFERENCES postroad.accounts (account) ON DELETE CASCADE,
    CONSTRAINT ck_api_keys_api_key CHECK (api_key ~ '^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$'),
    CONSTRAINT ck_api_keys_display_name CHECK (length(display_name) <= 200),
    CONSTRAINT ck_api_keys_scopes CHECK (
        CASE WHEN account IS NULL THEN scopes = '{operator}'
        ELSE scopes <@ '{config.read,config.write,messages.read,messages.write}' AND cardinality(scopes) > 0 END
    ),
    CONSTRAINT ck_api_keys_secret_sha256 CHECK (length(secret_sha256) = 32)
);
COMMENT ON COLUMN postroad.api_keys.account IS 'NULL for operators'' keys';

CREATE TABLE postroad.smtp_credentials (
    account text NOT NULL,
    smtp_credential text NOT NULL,
    uid uuid NOT NULL DEFAULT gen_random_uuid(),
    display_name text NOT NULL DEFAULT '',
    secret_sha256 bytea NOT NULL,
    scram_salt bytea NOT NULL,
    scram_iterations integer NOT NULL,
    scram_stored_key bytea NOT NULL,
    scram_server_key bytea NOT NULL,
    expire_time timestamptz,
    revoke_time timestamptz,
    create_time timestamptz NOT NULL DEFAULT transaction_timestamp(),
    update_time timestamptz NOT NULL DEFAULT transaction_timestamp(),
    version bigint NOT NULL DEFAULT 1,
    CONSTRAINT pk_smtp_credentials PRIMARY KEY (account, smtp_credential),
    CONSTRAINT uq_smtp_credentials_uid UNIQUE (uid),
    CONSTRAINT fk_smtp_credentials_account FOREIGN KEY (account) REFERENCES postroad.accounts (account) ON DELETE CASCADE,
    CONSTRAINT ck_smtp_credentials_smtp_credential CHECK (smtp_credential ~ '^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$'),
    CONSTRAINT ck_smtp_credentials_display_name CHECK (length(display_name) <= 200),
    CONSTRAINT ck_smtp_credentials_secret_sha256 CHECK (
        length(secret_sha256) = 32 AND length(scram_stored_key) = 32 AND length(scram_server_key) = 32
        AND scram_iterations >= 4096
    )
);

-- The first answer to a request_id, kept 24 h. Secrets are taken out before it is stored.
CREATE TABLE postroad.idempotency (
    principal text NOT NULL,
    request_id uuid NOT NULL,
    method text NOT NULL,
    payload_sha256 bytea NOT NULL,
    response bytea,
    create_time timestamptz NOT NULL DEFAULT transaction_timestamp(),
    CONSTRAINT pk_idempotency PRIMARY KEY (principal, request_id)
);
CREATE INDEX ix_idempotency_create_time ON postroad.idempotency (create_time);

CREATE TRIGGER touch BEFORE UPDATE ON postroad.accounts FOR EACH ROW EXECUTE FUNCTION postroad.touch();
CREATE TRIGGER touch BEFORE UPDATE ON postroad.smtp_credentials FOR EACH ROW EXECUTE FUNCTION postroad.touch();
-- last_use_time moves with use, which is no edit.
CREATE TRIGGER touch
    BEFORE UPDATE OF display_name, scopes, lookup, secret_sha256, expire_time, revoke_time ON postroad.api_keys
    FOR EACH ROW EXECUTE FUNCTION postroad.touch();
CREATE TRIGGER audit
    AFTER INSERT OR DELETE OR UPDATE OF display_name, scopes, lookup, secret_sha256, expire_time, revoke_time
    ON postroad.api_keys
    FOR EACH ROW EXECUTE FUNCTION postroad.audit();
CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON postroad.accounts
    FOR EACH ROW EXECUTE FUNCTION postroad.audit();
CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON postroad.account_sender_domains
    FOR EACH ROW EXECUTE FUNCTION postroad.audit();
CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON postroad.account_networks
    FOR EACH ROW EXECUTE FUNCTION postroad.audit();
CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON postroad.smtp_credentials
    FOR EACH ROW EXECUTE FUNCTION postroad.audit();

DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY[
        'accounts', 'former_accounts', 'account_sender_domains', 'account_networks', 'api_keys', 'smtp_credentials'
    ] LOOP
        EXECUTE format('ALTER TABLE postroad.%I ENABLE ROW LEVEL SECURITY', name);
        EXECUTE format('ALTER TABLE postroad.%I FORCE ROW LEVEL SECURITY', name);
        EXECUTE format(
            'CREATE POLICY %I ON postroad.%I TO postroad_api '
            'USING (account = (SELECT postroad.current_account()) OR (SELECT postroad.is_operator()))',
            'pl_' || name || '_api', name
        );
    END LOOP;
END
$$;
-- A caller who is not known yet may look at the one key that it presents, and mark its use.
CREATE POLICY pl_api_keys_authenticate ON postroad.api_keys FOR SELECT TO postroad_api
    USING (lookup = (SELECT current_setting('postroad.api_key_lookup', true)));
CREATE POLICY pl_api_keys_mark_use ON postroad.api_keys FOR UPDATE TO postroad_api
    USING (lookup = (SELECT current_setting('postroad.api_key_lookup', true)));
ALTER TABLE postroad.idempotency ENABLE ROW LEVEL SECURITY;
ALTER TABLE postroad.idempotency FORCE ROW LEVEL SECURITY;
CREATE POLICY pl_idempotency_api ON postroad.idempotency TO postroad_api
    USING (principal = (SELECT postroad.current_principal()) AND principal <> '');
CREATE POLICY pl_idempotency_fleet ON postroad.idempotency TO postroad_fleet USING (true);

GRANT SELECT, INSERT, UPDATE, DELETE ON
    postroad.accounts, postroad.account_sender_domains, postroad.account_networks, postroad.api_keys,
    postroad.smtp_credentials
    TO postroad_api;
GRANT SELECT, INSERT, UPDATE ON postroad.former_accounts, postroad.idempotency TO postroad_api;
GRANT SELECT, DELETE ON postroad.idempotency TO postroad_fleet;
