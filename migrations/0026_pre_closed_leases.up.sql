-- Leases stay known after their end: what a spool says of REPLICATED mail counts under a lease of its own, however late.
-- Those that hold nothing any more are closed, so that nobody looks through them for mail to give back.
-- Lock and duration: ACCESS EXCLUSIVE on node_leases, milliseconds: a constant default writes no row, and there is a row
-- for each worker. Older code does not see the column; it deletes leases an hour after their end.

ALTER TABLE postroad.node_leases ADD COLUMN closed boolean NOT NULL DEFAULT false;
COMMENT ON COLUMN postroad.node_leases.closed IS 'Ended, and no row of the queue names it';
CREATE INDEX ix_node_leases_open ON postroad.node_leases (lease_until) WHERE NOT closed;
