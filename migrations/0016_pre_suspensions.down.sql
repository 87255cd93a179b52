DROP FUNCTION postroad.denial_receipts(text);
DROP POLICY pl_node_status_owner ON postroad.node_status;
DROP POLICY pl_nodes_owner ON postroad.nodes;
ALTER TABLE postroad.node_status DROP COLUMN denials_time;
ALTER TABLE postroad.denials DROP COLUMN version;
ALTER TABLE postroad.smtp_credentials DROP COLUMN suspend_reason, DROP COLUMN suspend_time;
