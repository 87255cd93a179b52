DROP INDEX postroad.ix_node_leases_open;
ALTER TABLE postroad.node_leases DROP COLUMN closed;
