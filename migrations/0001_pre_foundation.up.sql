-- What every later table leans on: scope of a transaction, triggers for version and audit, the audit log.
-- Lock and duration: new objects only, milliseconds. Older code does not see them.

-- A transaction says by set_config('postroad.account', ..., true) whose rows it may see: an account id, `*` after an
-- operator was authorised, or nothing. After such a transaction the setting reads as empty, which matches no row.
CREATE FUNCTION postroad.current_account() RETURNS text
    LANGUAGE sql STABLE PARALLEL SAFE
    RETURN coalesce(current_setting('postroad.account', true), '');

CREATE FUNCTION postroad.is_operator() RETURNS boolean
    LANGUAGE sql STABLE PARALLEL SAFE
    RETURN coalesce(current_setting('postroad.account', true), '') = '*';

CREATE FUNCTION postroad.current_principal() RETURNS text
    LANGUAGE sql STABLE PARALLEL SAFE
    RETURN coalesce(current_setting('postroad.principal', true), '');

-- Every edit moves update_time and version, which is the etag; no caller can forget it.
CREATE FUNCTION postroad.touch() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    NEW.update_time := transaction_timestamp();
    NEW.version := OLD.version + 1;
    RETURN NEW;
END
$$;

CREATE TABLE postroad.audit_log (
    audit_id bigint GENERATED ALWAYS AS IDENTITY,
    change_time timestamptz NOT NULL DEFAULT transaction_timestamp(),
    account text,
    principal text NOT NULL,
    request_id text NOT NULL,
    action text NOT NULL,
    table_name text NOT NULL,
    old_row jsonb,
    new_row jsonb,
    CONSTRAINT pk_audit_log PRIMARY KEY (audit_id),
    CONSTRAINT ck_audit_log_action CHECK (action IN ('INSERT', 'UPDATE', 'DELETE'))
);
CREATE INDEX ix_audit_log_account_audit_id ON postroad.audit_log (account, audit_id);
COMMENT ON TABLE postroad.audit_log IS 'Who changed what; written by trigger in the transaction of the change, never changed.';

-- Secrets and what could help to guess them stay out of the log, whichever table it serves.
CREATE FUNCTION postroad.without_secrets(value jsonb) RETURNS jsonb
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN value
        - '{secret_sha256,scram_salt,scram_stored_key,scram_server_key,password_sealed,key_sealed}'::text[];

-- Runs as the owner, so that no application role can write a row of its own making.
CREATE FUNCTION postroad.audit() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    before jsonb := CASE WHEN TG_OP <> 'INSERT' THEN postroad.without_secrets(to_jsonb(OLD)) END;
    after jsonb := CASE WHEN TG_OP <> 'DELETE' THEN postroad.without_secrets(to_jsonb(NEW)) END;
BEGIN
    INSERT INTO postroad.audit_log (account, principal, request_id, action, table_name, old_row, new_row)
    VALUES (
        coalesce(after, before) ->> 'account',
        postroad.current_principal(),
        coalesce(current_setting('postroad.request_id', true), ''),
        TG_OP, TG_TABLE_NAME, before, after
    );
    RETURN NULL;
END
$$;

-- The oldest code that may serve this schema; `serve` compares it with its own number.
CREATE TABLE postroad.schema_compat (
    singleton boolean NOT NULL DEFAULT true,
    oldest_code bigint NOT NULL,
    CONSTRAINT pk_schema_compat PRIMARY KEY (singleton),
    CONSTRAINT ck_schema_compat_singleton CHECK (singleton)
);
INSERT INTO postroad.schema_compat (oldest_code) VALUES (1);

ALTER TABLE postroad.audit_log ENABLE ROW LEVEL SECURITY;
ALTER TABLE postroad.audit_log FORCE ROW LEVEL SECURITY;
CREATE POLICY pl_audit_log_owner ON postroad.audit_log FOR INSERT TO postroad_owner WITH CHECK (true);
CREATE POLICY pl_audit_log_api ON postroad.audit_log FOR SELECT TO postroad_api
    USING (account = (SELECT postroad.current_account()) OR (SELECT postroad.is_operator()));

GRANT USAGE ON SCHEMA postroad TO postroad_api, postroad_fleet;
GRANT SELECT ON postroad.audit_log TO postroad_api;
GRANT SELECT ON postroad.schema_compat, postroad.schema_migrations TO postroad_api, postroad_fleet;
