-- Spools move from node to node by an operator's word, and what a damaged one lost is named.
-- Lock and duration: ACCESS EXCLUSIVE on a small table, milliseconds: columns with constant defaults write no row. Older
-- code names its columns and does not notice.

ALTER TABLE postroad.spools
    ADD COLUMN lost_messages text[] NOT NULL DEFAULT '{}',
    ADD COLUMN lost_count bigint NOT NULL DEFAULT 0,
    ADD COLUMN unnamed_losses boolean NOT NULL DEFAULT false;

-- Only operators change whose a spool is.
CREATE TRIGGER audit_node AFTER UPDATE OF node ON postroad.spools
    FOR EACH ROW WHEN (NEW.node <> OLD.node) EXECUTE FUNCTION postroad.audit();
