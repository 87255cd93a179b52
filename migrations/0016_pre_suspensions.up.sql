-- SMTP credentials can be suspended, and of everything denied it can be told which nodes have confirmed it: a denial
-- keeps the version of the set that first had it, a node's row when its version was heard of.
-- Lock and duration: ACCESS EXCLUSIVE on three small tables, milliseconds. Older code names its columns and does not
-- notice; what it denies has version 0, which every node confirms.

ALTER TABLE postroad.smtp_credentials
    ADD COLUMN suspend_time timestamptz,
    ADD COLUMN suspend_reason text NOT NULL DEFAULT '',
    ADD CONSTRAINT ck_smtp_credentials_suspend_reason
        CHECK (length(suspend_reason) <= 500 AND (suspend_time IS NOT NULL OR suspend_reason = ''));
ALTER TABLE postroad.denials ADD COLUMN version bigint NOT NULL DEFAULT 0;
ALTER TABLE postroad.node_status ADD COLUMN denials_time timestamptz;

-- An account may see which nodes have confirmed what it suspended, and nothing else of them.
CREATE POLICY pl_nodes_owner ON postroad.nodes FOR SELECT TO postroad_owner USING (true);
CREATE POLICY pl_node_status_owner ON postroad.node_status FOR SELECT TO postroad_owner USING (true);
CREATE FUNCTION postroad.denial_receipts(pool text)
    RETURNS TABLE (node text, node_pool text, connected boolean, denials_version bigint, denials_time timestamptz)
    LANGUAGE sql STABLE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
    SELECT n.node, n.node_pool, coalesce(s.connected, false), coalesce(s.denials_version, 0), s.denials_time
    FROM postroad.nodes AS n LEFT JOIN postroad.node_status AS s USING (node)
    WHERE n.state = 2 AND (pool IS NULL OR n.node_pool = pool)
    ORDER BY n.node
$$;
REVOKE EXECUTE ON FUNCTION postroad.denial_receipts(text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION postroad.denial_receipts(text) TO postroad_api;
