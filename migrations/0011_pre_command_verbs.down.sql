DROP POLICY pl_spools_account ON postroad.spools;

-- What older code cannot read or would misunderstand goes. The owner sees no row while row-level security is forced.
ALTER TABLE postroad.delivery_events NO FORCE ROW LEVEL SECURITY;
DELETE FROM postroad.delivery_events WHERE type > 10;
ALTER TABLE postroad.delivery_events FORCE ROW LEVEL SECURITY;
ALTER TABLE postroad.delivery_events
    DROP CONSTRAINT ck_delivery_events_type,
    ADD CONSTRAINT ck_delivery_events_type CHECK (type BETWEEN 1 AND 10);

ALTER TABLE postroad.commands NO FORCE ROW LEVEL SECURITY;
DELETE FROM postroad.commands WHERE verb <> 1 OR accepted_before IS NOT NULL;
ALTER TABLE postroad.commands FORCE ROW LEVEL SECURITY;
DROP INDEX postroad.ix_commands_account_operation;
ALTER TABLE postroad.commands
    DROP CONSTRAINT ck_commands_verb,
    ADD CONSTRAINT ck_commands_verb CHECK (verb = 1),
    DROP COLUMN operation,
    DROP COLUMN provider,
    DROP COLUMN accepted_before,
    DROP COLUMN filter_provider,
    DROP COLUMN filter_recipient_domain,
    DROP COLUMN filter_states,
    DROP COLUMN position,
    DROP COLUMN update_time;
COMMENT ON COLUMN postroad.commands.account IS NULL;
