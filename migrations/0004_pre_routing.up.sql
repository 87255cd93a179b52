-- Providers and the rules that name them.
-- Lock and duration: new objects only, milliseconds. Older code does not see them.

CREATE TABLE postroad.providers (
    uid uuid NOT NULL DEFAULT gen_random_uuid(),
    account text,
    provider text NOT NULL,
    display_name text NOT NULL DEFAULT '',
    state smallint NOT NULL DEFAULT 1,
    suspend_reason text NOT NULL DEFAULT '',
    kind text NOT NULL,
    endpoints jsonb NOT NULL,
    tls_policy smallint NOT NULL,
    ca_pem text NOT NULL DEFAULT '',
    username text NOT NULL DEFAULT '',
    password_sealed bytea,
    max_connections integer NOT NULL,
    max_messages_per_connection integer NOT NULL,
    create_time timestamptz NOT NULL DEFAULT transaction_timestamp(),
    update_time timestamptz NOT NULL DEFAULT transaction_timestamp(),
    version bigint NOT NULL DEFAULT 1,
    CONSTRAINT pk_providers PRIMARY KEY (uid),
    CONSTRAINT uq_providers_account_provider UNIQUE NULLS NOT DISTINCT (account, provider),
    CONSTRAINT fk_providers_account FOREIGN KEY (account) REFERENCES postroad.accounts (account) ON DELETE CASCADE,
    CONSTRAINT ck_providers_provider CHECK (provider ~ '^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$'),
    CONSTRAINT ck_providers_display_name CHECK (length(display_name) <= 200),
    CONSTRAINT ck_providers_state CHECK (state IN (1, 2)),
    CONSTRAINT ck_providers_suspend_reason CHECK (length(suspend_reason) <= 500 AND (state = 2 OR suspend_reason = '')),
    CONSTRAINT ck_providers_kind CHECK (kind = 'smtp'),
    CONSTRAINT ck_providers_endpoints CHECK (jsonb_array_length(endpoints) BETWEEN 1 AND 10),
    CONSTRAINT ck_providers_tls_policy CHECK (tls_policy BETWEEN 1 AND 4 AND (username = '' OR tls_policy = 4)),
    CONSTRAINT ck_providers_ca_pem CHECK (octet_length(ca_pem) <= 65536),
    CONSTRAINT ck_providers_username CHECK (octet_length(username) <= 255),
    CONSTRAINT ck_providers_password CHECK (password_sealed IS NULL OR username <> ''),
    CONSTRAINT ck_providers_max_connections CHECK (max_connections BETWEEN 1 AND 1000),
    CONSTRAINT ck_providers_max_messages_per_connection CHECK (max_messages_per_connection BETWEEN 1 AND 100000)
);
COMMENT ON COLUMN postroad.providers.account IS 'NULL for shared providers';
COMMENT ON COLUMN postroad.providers.endpoints IS '[{"host": text, "port": integer, "implicit_tls": boolean}]';
COMMENT ON COLUMN postroad.providers.tls_policy IS '1 none, 2 opportunistic, 3 required, 4 required and verified';

CREATE TABLE postroad.routing_rules (
    account text NOT NULL,
    routing_rule text NOT NULL,
    uid uuid NOT NULL DEFAULT gen_random_uuid(),
    display_name text NOT NULL DEFAULT '',
    priority integer NOT NULL,
    sender_patterns text[] NOT NULL DEFAULT '{}',
    recipient_patterns text[] NOT NULL DEFAULT '{}',
    headers jsonb NOT NULL DEFAULT '[]',
    min_size_bytes bigint NOT NULL DEFAULT 0,
    max_size_bytes bigint NOT NULL DEFAULT 0,
    disabled boolean NOT NULL DEFAULT false,
    create_time timestamptz NOT NULL DEFAULT transaction_timestamp(),
    update_time timestamptz NOT NULL DEFAULT transaction_timestamp(),
    version bigint NOT NULL DEFAULT 1,
    CONSTRAINT pk_routing_rules PRIMARY KEY (account, routing_rule),
    CONSTRAINT uq_routing_rules_uid UNIQUE (uid),
    CONSTRAINT fk_routing_rules_account FOREIGN KEY (account) REFERENCES postroad.accounts (account) ON DELETE CASCADE,
    CONSTRAINT ck_routing_rules_routing_rule CHECK (routing_rule ~ '^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$'),
    CONSTRAINT ck_routing_rules_display_name CHECK (length(display_name) <= 200),
    CONSTRAINT ck_routing_rules_priority CHECK (priority BETWEEN 0 AND 1000000),
    CONSTRAINT ck_routing_rules_sender_patterns CHECK (cardinality(sender_patterns) <= 500),
    CONSTRAINT ck_routing_rules_recipient_patterns CHECK (cardinality(recipient_patterns) <= 500),
    CONSTRAINT ck_routing_rules_headers CHECK (jsonb_array_length(headers) <= 20),
    CONSTRAINT ck_routing_rules_min_size_bytes CHECK (min_size_bytes >= 0),
    CONSTRAINT ck_routing_rules_max_size_bytes CHECK (max_size_bytes >= 0)
);
CREATE INDEX ix_routing_rules_account_priority ON postroad.routing_rules (account, priority, routing_rule);
COMMENT ON COLUMN postroad.routing_rules.headers IS '[{"name": text, "pattern": text}]';

-- A target holds its provider by foreign key, so that no rule is ever left naming nothing.
CREATE TABLE postroad.routing_rule_targets (
    account text NOT NULL,
    routing_rule text NOT NULL,
    position smallint NOT NULL,
    provider_uid uuid NOT NULL,
    weight integer NOT NULL,
    CONSTRAINT pk_routing_rule_targets PRIMARY KEY (account, routing_rule, position),
    CONSTRAINT fk_routing_rule_targets_routing_rule FOREIGN KEY (account, routing_rule)
        REFERENCES postroad.routing_rules (account, routing_rule) ON DELETE CASCADE,
    CONSTRAINT fk_routing_rule_targets_provider FOREIGN KEY (provider_uid) REFERENCES postroad.providers (uid),
    CONSTRAINT ck_routing_rule_targets_weight CHECK (weight BETWEEN 0 AND 1000)
);
CREATE INDEX ix_routing_rule_targets_provider_uid ON postroad.routing_rule_targets (provider_uid);

CREATE TRIGGER touch BEFORE UPDATE ON postroad.providers FOR EACH ROW EXECUTE FUNCTION postroad.touch();
CREATE TRIGGER touch BEFORE UPDATE ON postroad.routing_rules FOR EACH ROW EXECUTE FUNCTION postroad.touch();
CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON postroad.providers
    FOR EACH ROW EXECUTE FUNCTION postroad.audit();
CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON postroad.routing_rules
    FOR EACH ROW EXECUTE FUNCTION postroad.audit();
CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON postroad.routing_rule_targets
    FOR EACH ROW EXECUTE FUNCTION postroad.audit();

DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY['providers', 'routing_rules', 'routing_rule_targets'] LOOP
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
-- Shared providers may be named by every account.
CREATE POLICY pl_providers_shared ON postroad.providers FOR SELECT TO postroad_api
    USING (account IS NULL AND (SELECT postroad.current_account()) <> '');

GRANT SELECT, INSERT, UPDATE, DELETE ON postroad.providers, postroad.routing_rules, postroad.routing_rule_targets
    TO postroad_api;
