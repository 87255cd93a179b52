CREATE SEQUENCE postroad.lease_epoch AS bigint;
-- Above what was counted before there were lots.
SELECT setval('postroad.lease_epoch', (extract(epoch FROM clock_timestamp()) * 1000)::bigint);
GRANT USAGE ON SEQUENCE postroad.lease_epoch TO postroad_fleet;
ALTER TABLE postroad.node_leases ALTER COLUMN epoch SET DEFAULT nextval('postroad.lease_epoch');
