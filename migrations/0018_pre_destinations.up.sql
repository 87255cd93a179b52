-- Destinations can be suspended: domains of recipients, for one account or for all. Nodes of older software do not know
-- such denials and are not told of them; a node's row says from which version on it is.
-- Lock and duration: a new table; ACCESS EXCLUSIVE on two small tables, milliseconds. Older code does not know the new
-- kind: while a destination is suspended, a replica that runs it passes no news on to its nodes, which then confirm
-- nothing. Suspend the first one when every replica is new.

CREATE TABLE postroad.suspended_destinations (
    uid uuid NOT NULL DEFAULT gen_random_uuid(),
    account text,
    destination text NOT NULL,
    suspend_time timestamptz NOT NULL DEFAULT transaction_timestamp(),
    suspend_reason text NOT NULL DEFAULT '',
    CONSTRAINT pk_suspended_destinations PRIMARY KEY (uid),
    CONSTRAINT uq_suspended_destinations_account_destination UNIQUE NULLS NOT DISTINCT (account, destination),
    CONSTRAINT fk_suspended_destinations_account FOREIGN KEY (account)
        REFERENCES postroad.accounts (account) ON DELETE CASCADE,
    CONSTRAINT ck_suspended_destinations_destination CHECK (length(destination) BETWEEN 1 AND 255),
    CONSTRAINT ck_suspended_destinations_suspend_reason CHECK (length(suspend_reason) <= 500)
);
COMMENT ON COLUMN postroad.suspended_destinations.account IS 'NULL for those of all accounts together';
CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON postroad.suspended_destinations
    FOR EACH ROW EXECUTE FUNCTION postroad.audit();
ALTER TABLE postroad.suspended_destinations ENABLE ROW LEVEL SECURITY;
ALTER TABLE postroad.suspended_destinations FORCE ROW LEVEL SECURITY;
CREATE POLICY pl_suspended_destinations_api ON postroad.suspended_destinations TO postroad_api
    USING (account = (SELECT postroad.current_account()) OR (SELECT postroad.is_operator()));
GRANT SELECT, INSERT, UPDATE, DELETE ON postroad.suspended_destinations TO postroad_api;

-- Kind 4: destination.
ALTER TABLE postroad.denials
    DROP CONSTRAINT ck_denials_kind,
    ADD CONSTRAINT ck_denials_kind CHECK (kind BETWEEN 1 AND 4);

ALTER TABLE postroad.node_status ADD COLUMN destinations_version bigint;
COMMENT ON COLUMN postroad.node_status.destinations_version
    IS 'From this version of the denials on the node is told of destinations; NULL: its software does not know them';

-- As denial_receipts(pool), and from which version on a node is told of denials of a kind: NULL when it is not.
CREATE FUNCTION postroad.denial_receipts(pool text, kind smallint)
    RETURNS TABLE (
        node text, node_pool text, connected boolean, denials_version bigint, denials_time timestamptz, told_since bigint
    )
    LANGUAGE sql STABLE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
    SELECT n.node, n.node_pool, coalesce(s.connected, false), coalesce(s.denials_version, 0), s.denials_time,
        CASE WHEN kind = 4 THEN s.destinations_version ELSE 0 END
    FROM postroad.nodes AS n LEFT JOIN postroad.node_status AS s USING (node)
    WHERE n.state = 2 AND (pool IS NULL OR n.node_pool = pool)
    ORDER BY n.node
$$;
REVOKE EXECUTE ON FUNCTION postroad.denial_receipts(text, smallint) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION postroad.denial_receipts(text, smallint) TO postroad_api;
