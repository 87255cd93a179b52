-- Commands beyond cancelling, and commands on all that a filter describes: one row for each spool, and one `operation` for
-- all of them. Kinds of events that commands leave behind.
-- Lock and duration: ACCESS EXCLUSIVE on commands, milliseconds while few are kept: columns with constant defaults write no
-- row, the check and the index read those that are there. ACCESS EXCLUSIVE on delivery_events, milliseconds: NOT VALID reads
-- no row, and those there keep the narrower check. Older code goes on: what it stores is an operation of its own.

ALTER TABLE postroad.commands
    ADD COLUMN operation uuid,
    ADD COLUMN provider text NOT NULL DEFAULT '',
    ADD COLUMN accepted_before timestamptz,
    ADD COLUMN filter_provider text NOT NULL DEFAULT '',
    ADD COLUMN filter_recipient_domain text NOT NULL DEFAULT '',
    ADD COLUMN filter_states smallint[] NOT NULL DEFAULT '{}',
    ADD COLUMN position uuid,
    ADD COLUMN update_time timestamptz,
    DROP CONSTRAINT ck_commands_verb,
    ADD CONSTRAINT ck_commands_verb CHECK (verb BETWEEN 1 AND 6);
COMMENT ON COLUMN postroad.commands.operation IS 'What the API shows: all rows of one call. NULL: the row alone, under its own id';
COMMENT ON COLUMN postroad.commands.account IS 'Without prefix; - for every account';
COMMENT ON COLUMN postroad.commands.provider IS 'Where a reroute leads, by full name';
COMMENT ON COLUMN postroad.commands.accepted_before IS 'Set on a command with a filter, which names no messages';
COMMENT ON COLUMN postroad.commands.position IS 'Messages with ids up to here are done, or a former account''s';
COMMENT ON COLUMN postroad.commands.update_time IS 'When the spool told of it last';
CREATE INDEX ix_commands_account_operation ON postroad.commands (account, (coalesce(operation, command)));

ALTER TABLE postroad.delivery_events
    DROP CONSTRAINT ck_delivery_events_type,
    ADD CONSTRAINT ck_delivery_events_type CHECK (type BETWEEN 1 AND 14) NOT VALID;

-- A command with a filter goes to every spool, whoever gives it.
CREATE POLICY pl_spools_account ON postroad.spools FOR SELECT TO postroad_api
    USING ((SELECT postroad.current_account()) <> '');
