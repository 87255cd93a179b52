-- Spools whose disk will not come back, by an operator's word. Such a spool is nobody's: its row in `spools` is gone, and
-- stays away when the disk turns up all the same. What waited there is ended by the leader, which remembers how far it is.
-- Lock and duration: SHARE ROW EXCLUSIVE on spools for a trigger, milliseconds; the rest are new objects. Older code does
-- not see them, and what it inserts goes as well; mail of a spool that was given up waits for a leader of this code.

CREATE TABLE postroad.given_up_spools (
    spool uuid NOT NULL,
    node text NOT NULL,
    create_time timestamptz NOT NULL DEFAULT transaction_timestamp(),
    position uuid NOT NULL DEFAULT '00000000-0000-0000-0000-000000000000',
    position_index integer NOT NULL DEFAULT -1,
    end_time timestamptz,
    CONSTRAINT pk_given_up_spools PRIMARY KEY (spool)
);
COMMENT ON TABLE postroad.given_up_spools IS 'Kept for ever: a disk that turns up must not be believed to be a new one';
COMMENT ON COLUMN postroad.given_up_spools.position IS 'Recipients up to here, in order of message and index, have ended';
CREATE TRIGGER audit AFTER INSERT ON postroad.given_up_spools
    FOR EACH ROW EXECUTE FUNCTION postroad.audit();

-- After the insert, which has waited for whoever gives the spool up at that moment.
CREATE FUNCTION postroad.refuse_given_up_spool() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF EXISTS (SELECT FROM postroad.given_up_spools AS g WHERE g.spool = NEW.spool) THEN
        DELETE FROM postroad.spools AS s WHERE s.spool = NEW.spool;
    END IF;
    RETURN NULL;
END
$$;
CREATE TRIGGER refuse_given_up AFTER INSERT ON postroad.spools
    FOR EACH ROW EXECUTE FUNCTION postroad.refuse_given_up_spool();

ALTER TABLE postroad.given_up_spools ENABLE ROW LEVEL SECURITY;
ALTER TABLE postroad.given_up_spools FORCE ROW LEVEL SECURITY;
CREATE POLICY pl_given_up_spools_operator ON postroad.given_up_spools TO postroad_api
    USING ((SELECT postroad.is_operator()));
CREATE POLICY pl_given_up_spools_fleet ON postroad.given_up_spools TO postroad_fleet USING (true);
GRANT SELECT, INSERT ON postroad.given_up_spools TO postroad_api;
GRANT SELECT, UPDATE ON postroad.given_up_spools TO postroad_fleet;

-- A command with a filter passes over what is empty and of a revoked node, whoever gives it.
CREATE POLICY pl_nodes_account ON postroad.nodes FOR SELECT TO postroad_api
    USING ((SELECT postroad.current_account()) <> '' AND state = 3);
