DO $$
BEGIN
    -- Their mail would be gone.
    IF EXISTS (SELECT FROM postroad.handovers) THEN
        RAISE EXCEPTION 'mail is being handed over';
    END IF;
END
$$;
REVOKE INSERT ON postroad.commands FROM postroad_fleet;
ALTER TABLE postroad.node_status DROP COLUMN closed;
ALTER TABLE postroad.nodes DROP COLUMN drain;
DROP TABLE postroad.drain_targets, postroad.node_drains, postroad.handover_contents, postroad.handovers;
