-- Limits of accounts and shared ones, and each account's share of delivery.
-- Lock and duration: a new table; ACCESS EXCLUSIVE on accounts, milliseconds: a column with a constant default writes no
-- row. Older code does not see the one and leaves the other at its default.

CREATE TABLE postroad.limit_policies (
    uid uuid NOT NULL DEFAULT gen_random_uuid(),
    account text,
    limit_id text NOT NULL,
    display_name text NOT NULL DEFAULT '',
    scope smallint NOT NULL,
    subject text NOT NULL DEFAULT '',
    unit smallint NOT NULL,
    amount bigint NOT NULL,
    period_s double precision NOT NULL,
    burst bigint NOT NULL DEFAULT 0,
    at_once boolean NOT NULL GENERATED ALWAYS AS (period_s = 0) STORED,
    create_time timestamptz NOT NULL DEFAULT transaction_timestamp(),
    update_time timestamptz NOT NULL DEFAULT transaction_timestamp(),
    version bigint NOT NULL DEFAULT 1,
    CONSTRAINT pk_limit_policies PRIMARY KEY (uid),
    CONSTRAINT uq_limit_policies_account_limit_id UNIQUE NULLS NOT DISTINCT (account, limit_id),
    CONSTRAINT uq_limit_policies_account_scope_unit_at_once_subject
        UNIQUE NULLS NOT DISTINCT (account, scope, unit, at_once, subject),
    CONSTRAINT fk_limit_policies_account FOREIGN KEY (account) REFERENCES postroad.accounts (account) ON DELETE CASCADE,
    CONSTRAINT ck_limit_policies_limit_id CHECK (limit_id ~ '^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$'),
    CONSTRAINT ck_limit_policies_display_name CHECK (length(display_name) <= 200),
    CONSTRAINT ck_limit_policies_scope CHECK (scope BETWEEN 1 AND 5 AND (account IS NULL OR scope NOT IN (3, 5))),
    CONSTRAINT ck_limit_policies_subject CHECK (length(subject) <= 255),
    CONSTRAINT ck_limit_policies_unit CHECK (unit BETWEEN 1 AND 4),
    CONSTRAINT ck_limit_policies_amount CHECK (amount BETWEEN 1 AND 4000000000),
    CONSTRAINT ck_limit_policies_period CHECK (period_s = 0 OR period_s BETWEEN 1 AND 2678400),
    CONSTRAINT ck_limit_policies_burst CHECK (burst BETWEEN 0 AND amount AND (period_s > 0 OR burst = 0))
);
COMMENT ON COLUMN postroad.limit_policies.account IS 'NULL for shared limits';
COMMENT ON COLUMN postroad.limit_policies.scope IS '1 account, 2 credential, 3 address, 4 provider, 5 destination';
COMMENT ON COLUMN postroad.limit_policies.subject IS 'Empty: each one by itself';
COMMENT ON COLUMN postroad.limit_policies.unit IS '1 message, 2 recipient, 3 byte, 4 connection';
COMMENT ON COLUMN postroad.limit_policies.period_s IS '0: connections at once';
COMMENT ON COLUMN postroad.limit_policies.burst IS '0: the default';
COMMENT ON CONSTRAINT uq_limit_policies_account_scope_unit_at_once_subject ON postroad.limit_policies IS
    'Two limits of one owner that count the same would draw from one bucket.';

CREATE TRIGGER touch BEFORE UPDATE ON postroad.limit_policies FOR EACH ROW EXECUTE FUNCTION postroad.touch();
CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON postroad.limit_policies
    FOR EACH ROW EXECUTE FUNCTION postroad.audit();

ALTER TABLE postroad.limit_policies ENABLE ROW LEVEL SECURITY;
ALTER TABLE postroad.limit_policies FORCE ROW LEVEL SECURITY;
-- Operators write limits: an account must not raise its own. The edit of an account by its own key reads them.
CREATE POLICY pl_limit_policies_operator ON postroad.limit_policies TO postroad_api USING ((SELECT postroad.is_operator()));
CREATE POLICY pl_limit_policies_account ON postroad.limit_policies FOR SELECT TO postroad_api
    USING (account = (SELECT postroad.current_account()));
-- Shared limits hold for every account; what they say of another one, or of hosts and addresses, is not its business.
CREATE POLICY pl_limit_policies_shared ON postroad.limit_policies FOR SELECT TO postroad_api
    USING (
        account IS NULL
        AND (SELECT postroad.current_account()) <> ''
        AND (
            subject = ''
            OR starts_with(subject, 'providers/')
            OR starts_with(subject || '/', 'accounts/' || (SELECT postroad.current_account()) || '/')
        )
    );
GRANT SELECT, INSERT, UPDATE, DELETE ON postroad.limit_policies TO postroad_api;

ALTER TABLE postroad.accounts
    ADD COLUMN delivery_weight integer NOT NULL DEFAULT 1,
    ADD CONSTRAINT ck_accounts_delivery_weight CHECK (delivery_weight BETWEEN 1 AND 100);
COMMENT ON COLUMN postroad.accounts.delivery_weight IS 'Its turns of delivery beside other accounts that wait';
